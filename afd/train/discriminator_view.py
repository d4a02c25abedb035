"""What the discriminator is shown: latents and prompt embeddings as they are, or something made from them.

A discriminator is called as `module(clips, condition)`. A view makes both out of (latents, prompts, prompt embeddings),
once per step, for teacher and student clips alike; noise, penalty, replay and scoring then work on what it returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from afd.types import Rollout, VideoBatch


class DiscriminatorView(Protocol):
    """(latents [N, C, F, H, W], N prompts, prompt embeddings [N, L, D]) -> (clips [N, ...], condition [N, ...])."""

    def __call__(self, latents: Tensor, prompts: Sequence[str], prompt_embeds: Tensor) -> tuple[Tensor, Tensor]: ...


def latent_view(latents: Tensor, prompts: Sequence[str], prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """The view of discriminators on latents: nothing is changed."""
    return latents, prompt_embeds


def show(view: DiscriminatorView, teacher: VideoBatch, rollout: Rollout) -> tuple[VideoBatch, Rollout]:
    """A step's clips as the discriminator sees them: `latents` hold clips and `prompt_embeds` conditions.

    Args:
        view: of the run's discriminator.
        teacher: B prompts.
        rollout: N = B G rollouts, the G of a prompt in consecutive rows.
    Returns:
        Both with the same ids and rows.
    """
    group_size = len(rollout.latents) // len(teacher.latents)
    repeated = [prompt for prompt in teacher.prompts for _ in range(group_size)]
    real, condition = view(teacher.latents, teacher.prompts, teacher.prompt_embeds)
    fake, fake_condition = view(rollout.latents, repeated, rollout.prompt_embeds)
    return (
        replace(teacher, latents=real, prompt_embeds=condition),
        replace(rollout, latents=fake, prompt_embeds=fake_condition),
    )
