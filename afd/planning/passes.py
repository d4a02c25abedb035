"""What a step of each objective does, in passes of its models: memory, seconds and collectives follow from this.

Two steps are planned where steps differ. The mean one decides seconds, cost and collectives: a rollout that ends after
a random number of its denoising steps takes the mean number, and a student that moves every k steps takes 1/k of an
update. The longest one (`StepPasses.longest`) decides memory: all denoising steps, and the student moves. The
discriminator's warm-up, evaluation and commits are no part of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Literal

from afd.config import RunConfig

Guide = Literal["discriminator", "scores"]


@dataclass(frozen=True)
class StepPasses:
    """A step of an objective; every objective updates the student on all clips of the step.

    Attributes:
        objective: its name.
        num_times: denoising passes of a chunk in a rollout, all of them; 0 for an objective that rolls nothing out.
        first_num_times: those of the first chunk; None where it has no times of its own.
        is_truncated: a rollout ends after 1 to all of them, each as likely, and so does the first chunk of its own.
        has_old_pass: rollouts are the old policy's, and the update needs its velocity.
        has_prior_pass: the update needs the initial student's velocity.
        discriminator_steps: optimizer steps of the discriminator; 0 trains none.
        judges: the discriminator scores every rollout.
        guide: what tells the student's clips where to go: the discriminator's gradient, or the difference of the
            critic's score and the real one. The update then repeats the rollout's denoising steps with all chunks at
            once, the last one with gradient. None has targets instead and one forward.
        updates: optimizer steps of the student on a step's clips.
        update_every: steps between two updates.
    """

    objective: str
    num_times: int = 0
    first_num_times: int | None = None
    is_truncated: bool = False
    has_old_pass: bool = False
    has_prior_pass: bool = False
    discriminator_steps: int = 0
    judges: bool = False
    guide: Guide | None = None
    updates: int = 1
    update_every: int = 1

    @property
    def lagging(self) -> int:
        """Roles whose velocity the update needs beside the student's."""
        return self.has_old_pass + self.has_prior_pass

    @property
    def most_times(self) -> int:
        """Denoising passes of the chunk that has most."""
        return max(self.num_times, self.first_num_times or 0)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Possible denoising passes (of the first chunk, of every other), each as likely."""
        own = [self.first_num_times] if self.first_num_times is not None else None
        others = [self.num_times]
        if self.is_truncated:
            others = list(range(1, self.num_times + 1))
            own = list(range(1, own[0] + 1)) if own else None
        return [(each, each) for each in others] if own is None else list(product(own, others))

    @property
    def mean_times(self) -> float:
        """Mean denoising passes of a chunk other than the first."""
        return sum(others for _, others in self.lengths) / len(self.lengths)

    @property
    def repeats(self) -> Fraction:
        """Mean forwards of the student without gradient before the one with, in an update."""
        if self.guide is None:
            return Fraction(0)
        return Fraction(sum(max(each) for each in self.lengths), len(self.lengths)) - 1

    @property
    def update_share(self) -> Fraction:
        """Of a step: how much of an update of the student it holds on average."""
        return Fraction(1, self.update_every)

    @property
    def longest(self) -> StepPasses:
        """The step that does everything: no rollout ends early, the student moves."""
        return replace(self, is_truncated=False, update_every=1)


def step_passes(config: RunConfig) -> StepPasses:
    """Read what a step does off a configuration. Source: afd/train/objectives.py and *_objective.py."""
    rollout, nft, steps = config.rollout, config.nft, config.discriminator.steps_per_student_step
    own = None if rollout.first_chunk_steps is None else len(rollout.first_chunk_steps)
    rolled = StepPasses(config.objective, num_times=len(rollout.steps), first_num_times=own)
    if config.objective == "sft":
        return StepPasses(config.objective)
    if config.objective == "gan":
        return replace(rolled, is_truncated=True, discriminator_steps=steps, guide="discriminator")
    if config.objective == "dmd":
        return replace(rolled, is_truncated=True, guide="scores", update_every=config.dmd.critic_steps)
    return replace(
        rolled,
        has_old_pass=rollout.policy == "ema",
        has_prior_pass=nft.prior_weight > 0,
        discriminator_steps=steps,
        judges=True,
        updates=nft.updates_per_rollout,
    )
