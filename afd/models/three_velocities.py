"""v_old and v_ref computed beside v, block by block, while each block's frozen weights are whole.

With adapters the current student, the old policy and the reference share everything but the adapters, so under ZeRO-3
one gather of a block serves all three. Only v carries a gradient. Everything outside the blocks is frozen and common:
patches, times and prompts are embedded once, and one call of the head serves all roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afd.models.lora import acting_as


class LaggingPass:
    """The passes of other roles that go through the student together with the one that is being trained.

    Give a new one to every forward (`student(..., lagging=LaggingPass(["old", "reference"]))`) and read `velocities`
    after it.
    """

    def __init__(self, roles: Sequence[str]) -> None:
        self.roles = tuple(roles)
        self.velocities: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._done: set[int] = set()

    def start(self, tokens: Tensor) -> None:
        """Begin with the embedded tokens [N, tokens, dim], the same for every role."""
        self._tokens = dict.fromkeys(self.roles, tokens.detach())

    def advance(self, block: nn.Module, *inputs: Any) -> None:
        """Send every role's tokens through a block, once: a recomputation for the backward pass does nothing.

        Called from inside the block's own forward, where ZeRO-3 has made its weights whole.
        """
        if id(block) in self._done:
            return
        self._done.add(id(block))
        for role in self.roles:
            with acting_as(role, block):
                self._tokens[role] = block.forward(self._tokens[role], *inputs)

    def beside(self, tokens: Tensor) -> Tensor:
        """The trained role's tokens [N, tokens, dim], then the others' last as many: [N (1 + roles), tokens, dim]."""
        return torch.cat([tokens, *(self._tokens.pop(role)[:, -tokens.shape[1] :] for role in self.roles)])

    def split(self, velocities: Tensor) -> Tensor:
        """Keep the others' velocities and return the trained role's, from [N (1 + roles), C, F, H, W]."""
        first, *others = velocities.chunk(1 + len(self.roles))
        self.velocities = {role: each.detach() for role, each in zip(self.roles, others, strict=True)}
        return first
