"""Earlier rollouts shown to the discriminator again, so that it does not forget what the student has stopped doing."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from afd.distributed import seeded_generator
from afd.types import Rollout, VideoBatch


class RolloutReplay:
    """The last `num_steps` steps' (teacher clip, rollout, prompt) rows of this rank, on the CPU, bit for bit.

    A teacher clip and its prompt are kept once for the G rollouts of a group: a step takes (N + B) clips and B prompts
    of 4 bytes per number, N rollouts of B prompts on this rank, as the discriminator's view shows them. Decoded frames
    are no whole numbers of grey levels, so a byte each would not hold them; their latents would, but each clip
    replayed would be decoded again in every step.

    A row is only ever replaced by the row in the same place of an earlier step, and whether it is depends on the
    run's seed, the step and the sample alone: any number of ranks makes the same pairs.
    """

    def __init__(self, *, num_steps: int, share: float) -> None:
        self.share = share
        self._steps: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=num_steps)

    def mix(self, teacher: VideoBatch, rollout: Rollout, *, seed: tuple[int, ...]) -> tuple[VideoBatch, Rollout]:
        """Pairs for one update of the discriminator: this step's, a share of them replaced by remembered ones.

        Args:
            teacher: B prompts.
            rollout: N = B G rollouts.
            seed: of this update's choices.
        Returns:
            N rows (G = 1) of teacher clips and rollouts, or the arguments where nothing is replayed.
        """
        if self.share == 0:
            return teacher, rollout
        group_size = len(rollout.latents) // len(teacher.latents)
        teacher_rows = teacher.latents.repeat_interleave(group_size, dim=0)
        mixed = [teacher_rows, rollout.latents.clone(), rollout.prompt_embeds.clone()]
        if self._steps:
            for row, key in enumerate(teacher.seed_keys(group_size)):
                generator = seeded_generator(*seed, *key)
                chance, which = torch.rand(2, generator=generator).tolist()
                if chance < self.share:
                    earlier = self._steps[int(which * len(self._steps))]
                    for target, source in zip(mixed, earlier, strict=True):
                        target[row] = source[row * len(source) // len(target)]  # its own, or its group's
        real, fake, prompt = mixed
        every_row = VideoBatch(rollout.sample_ids, (), real, prompt)
        return every_row, Rollout(fake, prompt, rollout.group_ids, rollout.sample_ids)

    def remember(self, teacher: VideoBatch, rollout: Rollout) -> None:
        """Keep a step's B teacher clips and N rollouts for later ones, where anything is ever replayed."""
        if self.share > 0:
            group_size = len(rollout.latents) // len(teacher.latents)
            once = rollout.prompt_embeds[::group_size].contiguous()  # a strided view would keep, and save, every row
            self._steps.append((teacher.latents.cpu(), rollout.latents.cpu(), once.cpu()))

    def state_dict(self) -> list[list[Tensor]]:
        """Everything remembered, oldest first."""
        return [list(step) for step in self._steps]

    def load_state_dict(self, state: list[list[Tensor]]) -> None:
        """Take back what `state_dict` returned, or an older one with a teacher clip and a prompt for every rollout."""
        self._steps.clear()
        steps: Any = (tuple(step) for step in state)
        self._steps.extend(steps)
