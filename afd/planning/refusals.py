"""What is refused before a run starts, in one sentence each: `afd plan` and the trainer's start-up both say it.

Owns what follows from the configuration's numbers alone: what does not divide, does not fit, or is not there to be
used. Files are `afd.train.preflight`'s.
"""

from __future__ import annotations

from typing import Any

from afd.config import RunConfig, StudentShape
from afd.config_file import ConfigError
from afd.planning.memory import GIB, Memory
from afd_kernels.block_causal_attention import parse_impl
from afd_kernels.block_causal_attention_triton import HEAD_DIMS
from afd_kernels.layout import whole_chunk_spans

Batch = tuple[int, int, int]  # (global, micro, accumulation)


def batch_arithmetic(ds_config: dict[str, Any], world_size: int) -> Batch:
    """Solve global = micro * accumulation * world_size for the number the JSON leaves out.

    Returns:
        (global batch, micro batch per rank, accumulation steps).
    Raises:
        ValueError: the numbers do not divide, or all three are given and disagree.
    """
    total = ds_config["train_batch_size"]
    micro = ds_config.get("train_micro_batch_size_per_gpu")
    accumulation = ds_config.get("gradient_accumulation_steps")
    given = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "ranks": world_size,
    }
    for name, number in given.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    known = (micro or 1) * (accumulation or 1) * world_size
    exact = micro is not None and accumulation is not None
    if total % known != 0 or (exact and total != known):
        factors = " * ".join(f"{name} {number}" for name, number in list(given.items())[1:] if number is not None)
        verb = "must equal" if exact else "must be a multiple of"
        raise ValueError(f"train_batch_size {total} {verb} {factors} = {known}")
    return total, micro or total // known, accumulation or total // known


def check_batches(
    config: RunConfig, ds_configs: tuple[dict[str, Any], ...], *, num_gpus: int
) -> tuple[Batch, Batch | None, Batch | None]:
    """Check that the batches divide among the ranks and the groups, and agree with each other.

    Args:
        config: the run's.
        ds_configs: of the student's engine, of the discriminator's (not read where none is built) and, for objective
            dmd, of the critic's.
        num_gpus: ranks.
    Returns:
        (global, micro, accumulation) of the student, the discriminator and the critic; None where none is built.
    Raises:
        ConfigError: the first thing that does not divide.
    """
    try:
        student = batch_arithmetic(ds_configs[0], num_gpus)
        discriminator = batch_arithmetic(ds_configs[1], num_gpus) if config.has_discriminator else None
        critic = batch_arithmetic(ds_configs[2], num_gpus) if config.objective == "dmd" else None
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if discriminator is not None and student[0] != discriminator[0]:
        raise ConfigError(
            f"train_batch_size must be the same in both DeepSpeed JSONs (rollouts per step), got {student[0]} for the "
            f"student and {discriminator[0]} for the discriminator"
        )
    if critic is not None and student[0] != critic[0]:
        raise ConfigError(f"train_batch_size of dmd.ds_config must be {student[0]} like the student's, got {critic[0]}")
    group_size = config.rollout.group_size
    if student[0] % (group_size * num_gpus):
        raise ConfigError(
            f"train_batch_size {student[0]} must be a multiple of rollout.group_size {group_size} x {num_gpus} ranks"
        )
    return student, discriminator, critic


def check_divides(
    config: RunConfig,
    shape: StudentShape,
    latents: tuple[int, int, int, int],
    ds_configs: tuple[dict[str, Any], ...],
    *,
    num_gpus: int,
    gpus_per_node: int,
) -> tuple[Batch, Batch | None, Batch | None]:
    """Check that batches, heads, chunks and nodes divide, and that adapters to merge are there.

    Args:
        config: the run's.
        shape: the student's.
        latents: (C, F, H, W).
        ds_configs: as in `check_batches`, whose result this returns.
        num_gpus: ranks.
        gpus_per_node: ranks on one node.
    Raises:
        ConfigError: the first thing that does not divide or is not there.
    """
    if config.rollout.merge_adapters and not config.student.lora.rank:
        raise ConfigError("rollout.merge_adapters must be false without adapters (student.lora.rank = 0), got true")
    batches = check_batches(config, ds_configs, num_gpus=num_gpus)
    _check_chunks(config, shape, latents)
    _check_heads(config, shape, ds_configs[0])
    _check_nodes(ds_configs[0], num_gpus, gpus_per_node)
    return batches


def _check_chunks(config: RunConfig, shape: StudentShape, latents: tuple[int, int, int, int]) -> None:
    _, frames, height, width = latents
    if height % shape.patch_size[1] or width % shape.patch_size[2]:
        raise ConfigError(
            f"video.height and video.width must give latents divisible by the student's patch "
            f"{list(shape.patch_size[1:])}, got latents {height} x {width}"
        )
    try:
        whole_chunk_spans(frames, shape.chunk_frames, shape.first_chunk_frames)
    except ValueError as error:
        raise ConfigError(f"video.{error}") from error
    if not config.has_discriminator:
        return
    _check_windows(config, frames)
    if config.discriminator.kind == "backbone":
        try:
            config.discriminator.backbone.taps(shape.num_layers)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if config.discriminator.kind != "latent":
        return
    patch, scored = config.discriminator.shape.patch_size, [config.discriminator.clip_frames or frames, height, width]
    if any(size % each for size, each in zip(scored, patch, strict=True)):
        what = "latents" if config.discriminator.clip_frames is None else "windows of discriminator.clip_frames"
        raise ConfigError(f"discriminator.shape.patch_size must divide the {what} {scored}, got {list(patch)}")


def _check_windows(config: RunConfig, frames: int) -> None:
    """Windows lie within the video, each in a place of its own."""
    length, count = config.discriminator.clip_frames, config.discriminator.num_clips
    if length is not None and config.discriminator.kind == "vlm":
        raise ConfigError(
            f"discriminator.clip_frames must be null with kind vlm (see discriminator.vlm.fps), got {length}"
        )
    if length is None:
        if count > 1:
            raise ConfigError(f"discriminator.num_clips must be 1 without discriminator.clip_frames, got {count}")
        return
    if length > frames:
        raise ConfigError(
            f"discriminator.clip_frames must be at most {frames}, the video's latent frames, got {length}"
        )
    if count > frames - length + 1:
        raise ConfigError(
            f"discriminator.num_clips must be at most {frames - length + 1}, the places of {length} frames in a video "
            f"of {frames}, got {count}"
        )


def _check_heads(config: RunConfig, shape: StudentShape, ds_config: dict[str, Any]) -> None:
    parallel = ds_config.get("sequence_parallel_size", 1)
    if shape.num_heads % parallel:
        raise ConfigError(f"sequence_parallel_size must divide the student's {shape.num_heads} heads, got {parallel}")
    if parallel != 1:
        raise ConfigError(f"sequence_parallel_size must be 1 (the student splits videos over no ranks), got {parallel}")
    impl = config.student.attention_impl or shape.attention_impl
    try:
        name = parse_impl(impl)[0] if impl else ""
    except ValueError as error:
        raise ConfigError(f"student.attention_impl: {error}") from error
    if name == "triton" and shape.head_dim not in HEAD_DIMS:
        raise ConfigError(f"student.attention_impl {impl} takes head_dim {list(HEAD_DIMS)}, got {shape.head_dim}")


def _check_nodes(ds_config: dict[str, Any], num_gpus: int, gpus_per_node: int) -> None:
    if num_gpus > gpus_per_node and num_gpus % gpus_per_node:
        raise ConfigError(f"{num_gpus} ranks must fill whole nodes of {gpus_per_node}")
    hpz = ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if hpz > 1 and (num_gpus % hpz or gpus_per_node % hpz):
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size must divide {gpus_per_node} ranks of a node and {num_gpus} "
            f"ranks in all, got {hpz}"
        )


def check_fits(memory: Memory, device_bytes: int, device: str) -> None:
    """Check that the largest phase of a step fits.

    Args:
        memory: as planned.
        device_bytes: what allocations may fill.
        device: its name, for the message.
    Raises:
        ConfigError: the largest phase needs more.
    """
    if memory.peak > device_bytes:
        phase, parts = memory.peak_phase, memory.held | memory.phases[memory.peak_phase]
        largest = max(parts, key=lambda name: parts[name])
        raise ConfigError(
            f"the {phase} phase needs {memory.peak / GIB:.1f} GiB per rank and {device} offers "
            f"{device_bytes / GIB:.1f} (largest part: {largest}, "
            f"{parts[largest] / GIB:.1f} GiB); `afd plan` lists what to change"
        )
