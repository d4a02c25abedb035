"""Which module scores clips: one function from `discriminator.kind` to the discriminator's module."""

from __future__ import annotations

import torch
from torch import nn

from afd.config import RunConfig
from afd.distributed import World
from afd.models.clip_windows import ClipWindows
from afd.models.discriminator import LatentDiscriminator
from afd.train.preflight import RunPlan

_SEED_OFFSET = 7919


def build_discriminator(config: RunConfig, plan: RunPlan, world: World) -> nn.Module:
    """The discriminator of a run before its engine is built, on this process's device; collective.

    Only parameters that require a gradient are trained. The module is called as `module(clips, condition)` and returns
    scores [N] float32; for `kind: latent` clips are latents [N, C, F, H, W], condition is prompt embeddings [N, L, D].

    Args:
        config: the run's; new weights depend on its seed alone and leave the global random state as it was.
        plan: the run's, resolved.
        world: this process's place.
    """
    section = config.discriminator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + _SEED_OFFSET)
        discriminator: nn.Module = LatentDiscriminator(section.shape)
    if section.clip_frames is not None:
        discriminator = ClipWindows(discriminator, clip_frames=section.clip_frames, num_clips=section.num_clips)
    return discriminator.to(world.device)
