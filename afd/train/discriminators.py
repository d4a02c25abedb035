"""Which module scores clips, and what it is shown: two functions from `discriminator.kind`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afd.config import RunConfig, configured_shape
from afd.distributed import World
from afd.models.backbone_discriminator import BackboneDiscriminator, backbone_shape
from afd.models.clip_windows import ClipWindows
from afd.models.discriminator import LatentDiscriminator
from afd.models.encoders import VideoCodec, load_codec
from afd.models.student import CausalStudent
from afd.models.vlm_builder import build_pixel_view, build_vlm_discriminator, plan_vlm
from afd.models.weights import fill_student, open_student
from afd.train.discriminator_view import DiscriminatorView, latent_view
from afd.train.ds_config import DSConfig, engine_dtype, load_ds_config
from afd.train.engines import build_sharded, write_shard
from afd.train.preflight import RunPlan

_SEED_OFFSET = 7919


def build_discriminator(
    config: RunConfig, plan: RunPlan, world: World, *, ds_config: DSConfig | None = None
) -> nn.Module:
    """The discriminator of a run before its engine is built, on this process's device; collective.

    Only parameters that require a gradient are trained. The module is called as `module(clips, condition)` and returns
    scores [N] float32; for the latent kinds clips are latents [N, C, F, H, W], condition is prompt embeddings
    [N, L, D]; for `kind: vlm` what `build_view` makes of them.

    Args:
        config: the run's; new weights depend on its seed alone and leave the global random state as it was.
        plan: the run's, resolved.
        world: this process's place.
        ds_config: of the engine it is for, which decides shards and precision; by default the configured file's.
    """
    section = config.discriminator
    ds_config = ds_config or load_ds_config(section.ds_config)
    backbone = _load_backbone(config, plan, ds_config) if section.kind == "backbone" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + _SEED_OFFSET)
        if section.kind == "vlm":
            shown = plan_vlm(section.vlm, config.encoders, config.video)
            discriminator: nn.Module = build_vlm_discriminator(section.vlm, shown, dtype=engine_dtype(ds_config))
        elif backbone is not None:
            layers = section.backbone.taps(plan.shape.num_layers)
            discriminator = BackboneDiscriminator(backbone, layers, section.backbone)
            # DeepSpeed casts no module that holds shards already.
            discriminator.heads.to(engine_dtype(ds_config))
        else:
            discriminator = LatentDiscriminator(section.shape)
    if section.clip_frames is not None:
        discriminator = ClipWindows(discriminator, clip_frames=section.clip_frames, num_clips=section.num_clips)
    return discriminator.to(world.device)


def build_view(config: RunConfig, world: World, *, codec: VideoCodec | None = None) -> DiscriminatorView:
    """What the discriminator of a run is shown of (latents, prompts, prompt embeddings), on this process's device.

    Args:
        config: the run's.
        world: this process's place.
        codec: one that is loaded there; None loads one where the kind needs it.
    """
    section = config.discriminator
    if section.kind != "vlm":
        return latent_view
    shown = plan_vlm(section.vlm, config.encoders, config.video)
    return build_pixel_view(section.vlm, shown, codec or load_codec(config.encoders, device=world.device))


def _load_backbone(config: RunConfig, plan: RunPlan, ds_config: DSConfig) -> CausalStudent:
    """The initial student's blocks up to the last tapped one: shards where the engine is of stage 3, else whole copies
    in the precision that the engine computes in."""
    file = open_student(plan.student_path, config.student.model_dump())
    layers = config.discriminator.backbone.taps(file.shape.num_layers)
    shape = backbone_shape(configured_shape(file.shape, config.student), layers)
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        backbone = build_sharded(lambda: CausalStudent(shape), ds_config)
        fill_student(backbone, file.source, write_shard)
        return backbone
    dtype = engine_dtype(ds_config)
    with torch.device("meta"):
        backbone = CausalStudent(shape)

    def own(_: nn.Parameter, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(dtype, copy=True).contiguous(), requires_grad=False)

    fill_student(backbone, file.source, own)
    return backbone
