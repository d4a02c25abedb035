"""The discriminator's scores on a small set of clips that never changes: what moved is D, not the student.

The set pairs held-out prompts' teacher clips with the initial student's rollouts, neither of which D is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.distributed import World, gather_cat
from afd.evaluation.heldout import HeldoutEvaluator
from afd.train.discriminator_update import score
from afd.train.engines import Engine, gathered
from afd.train.objectives import Roles


def shared_rows(count: int, world: World) -> list[int]:
    """This rank's rows of `count`: as many on every rank, in rank order, the surplus at the end repeating the first."""
    share = -(-count // world.size)
    return [(world.rank * share + i) % count for i in range(share)]


@dataclass(frozen=True)
class ProbeSet:
    """This rank's rows of the set, as the discriminator's view shows them, on the CPU.

    Attributes:
        count: pairs on all ranks.
        real, fake: [rows, ...] teacher clips and the initial student's.
        condition: [rows, ...].
    """

    count: int
    real: Tensor
    fake: Tensor
    condition: Tensor

    def margins(self, engine: Engine, device: torch.device) -> Tensor:
        """Teacher's minus student's score [count] of every pair, on every rank, without gradient; collective."""
        condition = self.condition.to(device)
        real, fake = (score(engine, clips.to(device), condition) for clips in (self.real, self.fake))
        return gather_cat(real - fake)[: self.count]


def make_probe_set(roles: Roles, evaluator: HeldoutEvaluator, *, num_pairs: int, world: World) -> ProbeSet:
    """Roll the initial student out on held-out prompts, with the evaluation's own noise; collective.

    Args:
        roles: its reference average is the initial student.
        evaluator: the held-out prompts with their teacher clips.
        num_pairs: at most as many as there are held-out clips.
        world: this process's place.
    """
    batch = evaluator.batch
    count = min(num_pairs, len(batch.prompts))
    rows = shared_rows(count, world)
    with torch.no_grad(), roles.reference.applied(), gathered(roles.student) as student:
        fake = evaluator.sample(student, [(row, 0) for row in rows])
    prompts, embeds = [batch.prompts[row] for row in rows], batch.prompt_embeds[rows]
    real, condition = roles.view(batch.latents[rows], prompts, embeds)
    fake, _ = roles.view(fake, prompts, embeds)
    return ProbeSet(count, real.cpu(), fake.cpu(), condition.cpu())


class DiscriminatorProbe:
    """Measures a probe set now and then, and remembers the first measurement."""

    def __init__(self, pairs: ProbeSet, first: list[float] | None = None) -> None:
        """first: the margins of an earlier process's first measurement; None before there is one."""
        self.pairs, self.first = pairs, first

    def measure(self, engine: Engine, device: torch.device) -> dict[str, float]:
        """The discriminator on the set.

        Returns:
            `discriminator/probe_accuracy` (share of pairs ranked right, ties one half), `/probe_margin` (mean teacher
            score minus student score), `/probe_drift` (root mean square change of the pairs' margins since the first
            measurement; margins, because a Bradley-Terry score is only known up to a constant per prompt).
        """
        margins = self.pairs.margins(engine, device).double().cpu()
        if self.first is None:
            self.first = margins.tolist()
        change = margins - torch.tensor(self.first, dtype=torch.float64)
        accuracy = (margins > 0).double() + 0.5 * (margins == 0).double()
        return {
            "discriminator/probe_accuracy": accuracy.mean().item(),
            "discriminator/probe_margin": margins.mean().item(),
            "discriminator/probe_drift": change.square().mean().sqrt().item(),
        }
