"""Which module scores clips, and what it is shown: two functions from `discriminator.kind`."""

from __future__ import annotations

import torch
from torch import nn

from afd.config import RunConfig
from afd.distributed import World
from afd.models.clip_windows import ClipWindows
from afd.models.discriminator import LatentDiscriminator
from afd.models.encoders import load_codec
from afd.models.vlm_builder import build_pixel_view, build_vlm_discriminator, plan_vlm
from afd.train.discriminator_view import DiscriminatorView, latent_view
from afd.train.preflight import RunPlan

_SEED_OFFSET = 7919


def build_discriminator(
    config: RunConfig, plan: RunPlan, world: World, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The discriminator of a run before its engine is built, on this process's device; collective.

    Only parameters that require a gradient are trained. The module is called as `module(clips, condition)` and returns
    scores [N] float32; for `kind: latent` clips are latents [N, C, F, H, W], condition is prompt embeddings [N, L, D];
    for `kind: vlm` what `build_view` makes of them.

    Args:
        config: the run's; new weights depend on its seed alone and leave the global random state as it was.
        plan: the run's, resolved.
        world: this process's place.
        dtype: that large weights are loaded in: the engine's, which converts the others.
    """
    section = config.discriminator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + _SEED_OFFSET)
        if section.kind == "vlm":
            shown = plan_vlm(section.vlm, config.encoders, config.video)
            discriminator: nn.Module = build_vlm_discriminator(section.vlm, shown, dtype=dtype)
        else:
            discriminator = LatentDiscriminator(section.shape)
    if section.clip_frames is not None:
        discriminator = ClipWindows(discriminator, clip_frames=section.clip_frames, num_clips=section.num_clips)
    return discriminator.to(world.device)


def build_view(config: RunConfig, world: World) -> DiscriminatorView:
    """What the discriminator of a run is shown of (latents, prompts, prompt embeddings), on this process's device."""
    section = config.discriminator
    if section.kind != "vlm":
        return latent_view
    shown = plan_vlm(section.vlm, config.encoders, config.video)
    return build_pixel_view(section.vlm, shown, load_codec(config.encoders, device=world.device))
