"""Everything about a run that can be checked or said before a process group exists: what `--dry_run` prints.

All checks raise `ConfigError` with one line naming the field, what was expected and what came.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from afd.config import RunConfig, StudentShape, configured_shape
from afd.config_file import ConfigError, dump_config
from afd.models.encoders import QUICKSTART_ASSETS, latent_shape, text_encoder_folder
from afd.models.weights import read_student_shape
from afd.preparation import shard_folders
from afd.rollout import SamplerTimes, chunk_spans, sampler_times
from afd.train.ds_config import DSConfig, batch_arithmetic
from afd.train.learning_rate import check_lr_owner

_DISK_RESERVE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, resolved.

    Attributes:
        student_path: the weights it starts from.
        shape: the student's dimensions.
        num_parameters: of the student.
        latents: (C, F, H, W).
        world_size: ranks.
        rollouts: N per step over all ranks.
        prompts_per_rank: B on one rank.
        student_batch, discriminator_batch: (global, micro, accumulation).
        times: the sampler's grids.
    """

    student_path: Path
    shape: StudentShape
    num_parameters: int
    latents: tuple[int, int, int, int]
    world_size: int
    rollouts: int
    prompts_per_rank: int
    student_batch: tuple[int, int, int]
    discriminator_batch: tuple[int, int, int]
    times: SamplerTimes


def plan_run(config: RunConfig, ds_student: DSConfig, ds_discriminator: DSConfig, *, world_size: int) -> RunPlan:
    """Check a run against its files and resolve its arithmetic; reads headers only, writes nothing.

    Raises:
        ConfigError: the first thing that does not fit.
    """
    path = config.student.init_from or QUICKSTART_ASSETS / "student.safetensors"
    try:
        shape = configured_shape(read_student_shape(path), config.student)
        student_batch = batch_arithmetic(ds_student, world_size)
        discriminator_batch = batch_arithmetic(ds_discriminator, world_size)
        times = sampler_times(config.rollout)
        latents = latent_shape(config.encoders, config.video)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_shapes(config, shape, latents)
    _check_batches(config, student_batch, discriminator_batch, world_size)
    _check_zero(ds_student)
    check_lr_owner(config, ds_student, ds_discriminator)
    if config.nft.baseline == "group" and config.rollout.group_size == 1:
        raise ConfigError(
            "rollout.group_size must be > 1 with nft.baseline = group (or take nft.baseline=batch), got 1"
        )
    for folder in shard_folders(config) if config.teacher.kind == "shards" else ():
        if not (folder / "index.json").is_file():
            raise ConfigError(f"shard folder {folder} must hold index.json, which is missing (write one: afd prepare)")
    num_parameters = _count_parameters(path)
    _check_disk(config, num_parameters)
    rollouts = student_batch[0]
    return RunPlan(
        student_path=path,
        shape=shape,
        num_parameters=num_parameters,
        latents=latents,
        world_size=world_size,
        rollouts=rollouts,
        prompts_per_rank=rollouts // config.rollout.group_size // world_size,
        student_batch=student_batch,
        discriminator_batch=discriminator_batch,
        times=times,
    )


def _check_shapes(config: RunConfig, shape: StudentShape, latents: tuple[int, int, int, int]) -> None:
    channels, frames, height, width = latents
    if shape.in_channels != channels or shape.out_channels != channels:
        raise ConfigError(
            f"student must have in_channels = out_channels = {channels}, the channels of encoders.codec = "
            f"{config.encoders.codec}, got {shape.in_channels} and {shape.out_channels}"
        )
    if height % shape.patch_size[1] or width % shape.patch_size[2]:
        raise ConfigError(
            f"video.height and video.width must give latents divisible by the student's patch "
            f"{list(shape.patch_size[1:])}, got latents {height} x {width}"
        )
    try:
        chunk_spans(shape, frames)
    except ValueError as error:
        raise ConfigError(f"video.{error}") from error
    discriminator = config.discriminator.shape
    if discriminator.in_channels != channels:
        raise ConfigError(f"discriminator.shape.in_channels must be {channels}, got {discriminator.in_channels}")
    if any(size % patch for size, patch in zip((frames, height, width), discriminator.patch_size, strict=True)):
        raise ConfigError(
            f"discriminator.shape.patch_size must divide the latents {[frames, height, width]}, "
            f"got {list(discriminator.patch_size)}"
        )
    if config.encoders.text_len > shape.text_len:
        raise ConfigError(
            f"encoders.text_len must be at most {shape.text_len}, the student's text_len, "
            f"got {config.encoders.text_len}"
        )
    folder = text_encoder_folder(config.encoders)
    try:
        text_dim = json.loads((folder / "config.json").read_text())["d_model"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"encoders.text_path {folder} must hold a T5 config.json with d_model: {error}") from error
    for owner, got in (("student text_dim", shape.text_dim), ("discriminator.shape.text_dim", discriminator.text_dim)):
        if got != text_dim:
            raise ConfigError(f"{owner} must be {text_dim}, the width of the text encoder {folder.name}, got {got}")


def _check_batches(
    config: RunConfig, student: tuple[int, int, int], discriminator: tuple[int, int, int], world_size: int
) -> None:
    if student[0] != discriminator[0]:
        raise ConfigError(
            f"train_batch_size must be the same in both DeepSpeed JSONs (rollouts per step), got {student[0]} for the "
            f"student and {discriminator[0]} for the discriminator"
        )
    group_size = config.rollout.group_size
    if student[0] % (group_size * world_size):
        raise ConfigError(
            f"train_batch_size {student[0]} must be a multiple of rollout.group_size {group_size} x {world_size} ranks"
        )
    prompts = student[0] // group_size
    if config.teacher.kind == "physics" and config.teacher.num_prompts < prompts:
        raise ConfigError(
            f"teacher.num_prompts must be at least {prompts}, one step's, got {config.teacher.num_prompts}"
        )


def _check_zero(ds_student: DSConfig) -> None:
    zero = ds_student.get("zero_optimization", {})
    if zero.get("stage") == 3 and zero.get("stage3_param_persistence_threshold") != 0:
        raise ConfigError(
            "zero_optimization.stage3_param_persistence_threshold must be 0 (averages are swapped shard by shard), "
            f"got {zero.get('stage3_param_persistence_threshold')}"
        )


def _count_parameters(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _check_disk(config: RunConfig, num_parameters: int) -> None:
    folder = config.output_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"output_dir {config.output_dir} must be a folder, but {folder} is a file")
    needed = _DISK_RESERVE_BYTES + (config.checkpoint.keep + 1) * 40 * num_parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"output_dir {config.output_dir} needs about {needed / 2**30:.1f} GiB, only {free / 2**30:.1f} GiB are free"
        )


def describe_plan(config: RunConfig, plan: RunPlan, ds_student: DSConfig) -> str:
    """The text of `--dry_run`: resolved configuration, batch arithmetic, memory, and the shapes of one step."""
    (c, f, h, w), g, shape = plan.latents, config.rollout.group_size, plan.shape
    n, chunks = plan.rollouts // plan.world_size, len(chunk_spans(shape, f))
    tokens = f * (h // shape.patch_size[1]) * (w // shape.patch_size[2])
    stage = ds_student.get("zero_optimization", {}).get("stage", 0)
    mib = 2**20
    shards = plan.world_size if stage == 3 else 1
    held = {
        "student weights, gradients, Adam (fp32)": plan.num_parameters * 16 / (plan.world_size if stage else 1),
        "averages old, ema, reference": plan.num_parameters * 12 / shards,
        "KV cache of one micro batch": 8 * shape.num_layers * plan.student_batch[1] * tokens * shape.dim,
        "activations of one micro batch (about)": 4
        * plan.student_batch[1]
        * 2
        * tokens
        * shape.dim
        * 34
        * shape.num_layers,
        "rollouts, noise, v_old, v_ref, v*, x_t": 4 * n * c * f * h * w * (6 + plan.times.num_noises),
    }
    lines = ["# resolved configuration", dump_config(config).rstrip(), ""]
    lines += [
        "# batch arithmetic",
        f"ranks {plan.world_size}; rollouts per step N = {plan.rollouts} = {plan.rollouts // g} prompts x G {g}",
        f"per rank: {plan.prompts_per_rank} prompts, {n} rollouts",
        "student:       micro {1} x accumulation {2} x ranks {3} = {0}".format(*plan.student_batch, plan.world_size),
        "discriminator: micro {1} x accumulation {2} x ranks {3} = {0}".format(
            *plan.discriminator_batch, plan.world_size
        ),
        "",
        f"# memory per rank (estimate; ZeRO stage {stage}, {plan.num_parameters:,} student parameters)",
        *(f"{name}: {size / mib:.1f} MiB" for name, size in held.items()),
        f"total: {sum(held.values()) / mib:.1f} MiB",
        "",
        "# shapes of one step, per rank",
        f"teacher latents x^T      [{n // g}, {c}, {f}, {h}, {w}]",
        f"prompt embeddings        [{n // g}, {shape.text_len}, {shape.text_dim}]",
        f"rollouts x^S             [{n}, {c}, {f}, {h}, {w}]   {chunks} chunks of {shape.chunk_frames} frames, times "
        + plan.times.describe(),
        f"scores D(x, y)           [{n}]   gathered over ranks: [{plan.rollouts}]",
        f"weights w                [{n}] in [0, 1]",
        f"noised states x_t, v*    [{n}, {c}, {f}, {h}, {w}]   t [{n}, {f}]",
        f"student tokens           [{plan.student_batch[1]}, {2 * tokens}, {shape.dim}]   layout [clean | noisy]",
        f"velocities v, v_old{', v_ref' if config.nft.prior_weight else ''}  [{n}, {c}, {f}, {h}, {w}]",
    ]
    return "\n".join(lines)
