"""Everything about a run that can be checked or said before a process group exists: what `--dry_run` prints.

All checks raise `ConfigError` with one line naming the field, what was expected and what came.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from afd.config import RunConfig, StudentShape
from afd.config_file import ConfigError, dump_config
from afd.device import checked_device
from afd.models.encoders import latent_shape, read_text_config, student_path, text_encoder_folder
from afd.models.image_encoder import takes_images
from afd.models.vlm_builder import plan_vlm
from afd.models.weights import open_student, read_student_shape
from afd.planning.hardware import ASSUMED
from afd.planning.memory import Memory, describe_memory, plan_memory
from afd.planning.passes import StepPasses
from afd.planning.plan import critic_shape
from afd.planning.refusals import check_divides, check_fits
from afd.planning.report import step_line
from afd.planning.workload import Workload, build_workload, engine_settings
from afd.preparation import shard_places
from afd.rollout import SamplerTimes, chunk_spans, sampler_times
from afd.teachers.physics import heldout_prompts, training_prompts
from afd.train.commit import commit_bytes, list_commits
from afd.train.ds_config import DSConfig, engine_dtype, load_critic_config
from afd.train.learning_rate import check_lr_owner
from afd_kernels.block_causal_attention import check_impl

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
        student_batch, discriminator_batch, critic_batch: (global, micro, accumulation); None for an engine that is
            not built.
        times: the sampler's grids.
        passes: what a step does.
        memory: planned, per rank.
    """

    student_path: Path
    shape: StudentShape
    num_parameters: int
    latents: tuple[int, int, int, int]
    world_size: int
    rollouts: int
    prompts_per_rank: int
    student_batch: tuple[int, int, int]
    discriminator_batch: tuple[int, int, int] | None
    critic_batch: tuple[int, int, int] | None
    times: SamplerTimes
    passes: StepPasses
    memory: Memory


def plan_run(
    config: RunConfig, ds_student: DSConfig, ds_discriminator: DSConfig, *, world_size: int, is_fresh: bool = False
) -> RunPlan:
    """Check a run against its files and resolve its arithmetic; reads headers only, writes nothing.

    Args:
        config: the run.
        ds_student: its student's DeepSpeed JSON.
        ds_discriminator: its discriminator's.
        world_size: ranks.
        is_fresh: commits that are there are set aside and stay on the disk; else the run goes on from them and writes
            in their place.
    Raises:
        ConfigError: the first thing that does not fit.
    """
    path = student_path(config.student)
    try:
        student = open_student(path, config.student.model_dump())
        times = sampler_times(config.rollout)
        latents = latent_shape(config.encoders, config.video)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shape = student.shape
    _check_shapes(config, shape, latents)
    ds_configs = (ds_student, ds_discriminator, *load_critic_config(config))
    student_batch, discriminator_batch, critic_batch = check_divides(
        config,
        shape,
        latents,
        ds_configs,
        num_gpus=world_size,
        gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
    )
    check_attention(config, shape, engine_dtype(ds_student), _local_device())
    _check_teacher(config, student_batch[0])
    _check_zero(ds_student, *ds_configs[2:])
    check_lr_owner(config, ds_student, ds_discriminator)
    _check_objective(config, shape)
    _check_shards(config)
    workload = build_workload(
        config,
        shape,
        latents=latents,
        num_gpus=world_size,
        engines=(
            engine_settings(ds_student, student_batch),
            engine_settings(ds_discriminator, discriminator_batch) if discriminator_batch else None,
        ),
        kernels="fused" if torch.cuda.is_available() else "eager",
        critic=(critic_shape(config, shape), engine_settings(ds_configs[2], critic_batch)) if critic_batch else None,
    )
    _check_disk(config, workload, is_fresh=is_fresh)
    memory = plan_memory(workload)
    check_fits(memory, *local_memory(world_size))
    return RunPlan(
        student_path=path,
        shape=student.shape,
        num_parameters=student.num_parameters,
        latents=latents,
        world_size=world_size,
        rollouts=student_batch[0],
        prompts_per_rank=student_batch[0] // config.rollout.group_size // world_size,
        student_batch=student_batch,
        discriminator_batch=discriminator_batch,
        critic_batch=critic_batch,
        times=times,
        passes=workload.passes,
        memory=memory,
    )


def _check_shapes(config: RunConfig, shape: StudentShape, latents: tuple[int, int, int, int]) -> None:
    channels = latents[0]
    if takes_images(shape):
        raise ConfigError(
            "student must be a text-to-video student to be trained (shards hold no image conditions), got an "
            f"image-to-video one: in_channels {shape.in_channels}, out_channels {shape.out_channels}, image_dim "
            f"{shape.image_dim}"
        )
    if shape.in_channels != channels or shape.out_channels != channels:
        raise ConfigError(
            f"student must have in_channels = out_channels = {channels}, the channels of encoders.codec = "
            f"{config.encoders.codec}, got {shape.in_channels} and {shape.out_channels}"
        )
    if config.encoders.codec == "wan_vae" and config.encoders.vae_path is None:
        raise ConfigError("encoders.vae_path must name an AutoencoderKLWan folder for codec wan_vae, got none")
    discriminator = config.discriminator.shape
    has_shape = config.has_discriminator and config.discriminator.kind == "latent"
    if has_shape and discriminator.in_channels != channels:
        raise ConfigError(f"discriminator.shape.in_channels must be {channels}, got {discriminator.in_channels}")
    if config.encoders.text_len > shape.text_len:
        raise ConfigError(
            f"encoders.text_len must be at most {shape.text_len}, the student's text_len, "
            f"got {config.encoders.text_len}"
        )
    folder = text_encoder_folder(config.encoders)
    try:
        text_dim = read_text_config(folder)["d_model"]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    widths = {"student text_dim": shape.text_dim}
    widths |= {"discriminator.shape.text_dim": discriminator.text_dim} if has_shape else {}
    for owner, got in widths.items():
        if got != text_dim:
            raise ConfigError(f"{owner} must be {text_dim}, the width of the text encoder {folder.name}, got {got}")


def check_attention(config: RunConfig, shape: StudentShape, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse an implementation of attention that is not installed, or does not train on the device in the dtype.

    Raises:
        ConfigError: it names the key.
    """
    impl = config.student.attention_impl or shape.attention_impl
    if impl is None:
        return
    try:
        check_impl(impl, device, dtype, shape.head_dim)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"student.attention_impl: {error}") from error


def _check_teacher(config: RunConfig, rollouts: int) -> None:
    """The built-in world has as many prompts as are asked for, a step's at least, and its clips can be encoded here."""
    prompts, teacher = rollouts // config.rollout.group_size, config.teacher
    if teacher.kind == "physics" and teacher.num_prompts < prompts:
        raise ConfigError(f"teacher.num_prompts must be at least {prompts}, one step's, got {teacher.num_prompts}")
    try:
        if teacher.kind == "physics":
            training_prompts(teacher.num_prompts)
            heldout_prompts(teacher.num_heldout_prompts)
            checked_device(config.prepare.device, "prepare.device")
        if teacher.live.enabled:
            checked_device(teacher.live.device, "teacher.live.device")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_shards(config: RunConfig) -> None:
    for folder, remote in shard_places(config) if config.teacher.kind != "physics" else ():
        if remote is None and not (folder / "index.json").is_file():
            raise ConfigError(f"shard folder {folder} must hold index.json, which is missing (write one: afd prepare)")


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def local_memory(world_size: int) -> tuple[int, str]:
    """Bytes that this rank may allocate, and where: its GPU's, or its share of the machine's memory."""
    device = _local_device()
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * ASSUMED.usable_memory), torch.cuda.get_device_name(device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // ranks, f"this machine's memory over {ranks} ranks"


def _check_objective(config: RunConfig, shape: StudentShape) -> None:
    """What an objective and its discriminator need beyond latents: groups, a score, no gradient through a decoder."""
    if config.nft.baseline == "group" and config.rollout.group_size == 1:
        raise ConfigError(
            "rollout.group_size must be > 1 with nft.baseline = group (or take nft.baseline=batch), got 1"
        )
    if config.has_discriminator and config.discriminator.kind == "vlm":
        if config.objective == "gan":
            raise ConfigError(
                "discriminator.kind must be latent or backbone with objective = gan (no gradient passes the decoder), "
                "got vlm"
            )
        try:
            plan_vlm(config.discriminator.vlm, config.encoders, config.video)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if config.nft.noise_coupling and config.objective != "afd":
        raise ConfigError(
            f"nft.noise_coupling must be 0 with objective = {config.objective} (it has no rollout noise to couple to), "
            f"got {config.nft.noise_coupling}"
        )
    if config.objective != "dmd":
        return
    path = config.dmd.real_score
    if path is None or not path.is_file():
        raise ConfigError(f"dmd.real_score must be a student file trained on the teacher's videos, got {path}")
    try:
        real = read_student_shape(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if (real.in_channels, real.text_dim) != (shape.in_channels, shape.text_dim):
        raise ConfigError(
            f"dmd.real_score must have in_channels {shape.in_channels} and text_dim {shape.text_dim} like the student, "
            f"got {real.in_channels} and {real.text_dim}"
        )


def _check_zero(ds_student: DSConfig, ds_critic: DSConfig | None = None) -> None:
    for ds_config, of in ((ds_student, ""), (ds_critic or {}, " of dmd.ds_config")):
        zero = ds_config.get("zero_optimization", {})
        if zero.get("stage") == 3 and zero.get("stage3_param_persistence_threshold") != 0:
            raise ConfigError(
                f"zero_optimization.stage3_param_persistence_threshold{of} must be 0 (averages are swapped shard by "
                f"shard), got {zero.get('stage3_param_persistence_threshold')}"
            )


def _commit_bytes(work: Workload) -> int:
    """Of one commit of a run."""
    count, critic = work.parameters, work.critic
    total = commit_bytes(
        count.trained, count.total - count.trained, width=work.student.width, averages=work.learner.averages
    )
    if work.discriminator is not None:
        total += commit_bytes(work.discriminator_parameters.trained, width=work.discriminator.width)
    if critic is not None:
        total += commit_bytes(critic.parameters.trained, width=critic.engine.width)
    return total


def _check_disk(config: RunConfig, work: Workload, *, is_fresh: bool) -> None:
    folder = config.output_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"output_dir {config.output_dir} must be a folder, but {folder} is a file")
    there = 0 if is_fresh else len(list_commits(config.output_dir / "checkpoints"))
    more = config.checkpoint.keep + 1 - min(there, config.checkpoint.keep)
    needed = _DISK_RESERVE_BYTES + more * _commit_bytes(work)
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
    passes, others = plan.passes, {"discriminator": plan.discriminator_batch, "critic": plan.critic_batch}
    micro = "{0} micro {2} x accumulation {3} x ranks {4} = {1}"
    lines = ["# resolved configuration", dump_config(config).rstrip(), ""]
    lines += [
        "# batch arithmetic",
        f"ranks {plan.world_size}; rollouts per step N = {plan.rollouts} = {plan.rollouts // g} prompts x G {g}",
        f"per rank: {plan.prompts_per_rank} prompts, {n} rollouts",
        micro.format("student:      ", *plan.student_batch, plan.world_size),
        *(micro.format(f"{name}:".ljust(14), *batch, plan.world_size) for name, batch in others.items() if batch),
        step_line(passes),
        "",
        f"# memory per rank (estimate; ZeRO stage {stage}, {plan.num_parameters:,} student parameters)",
        *describe_memory(plan.memory),
        "",
        "# shapes of one step, per rank",
        f"teacher latents x^T      [{n // g}, {c}, {f}, {h}, {w}]",
        f"prompt embeddings        [{n // g}, {shape.text_len}, {shape.text_dim}]",
    ]
    clips = f"[{n}, {c}, {f}, {h}, {w}]"
    if passes.num_times:
        lines += [
            f"rollouts x^S             {clips}   {chunks} chunks of {shape.chunk_frames} frames, times "
            + plan.times.describe()
        ]
    if passes.judges:
        lines += [
            f"scores D(x, y)           [{n}]   gathered over ranks: [{plan.rollouts}]",
            f"weights w                [{n}] in [0, 1]",
        ]
    if passes.guide is None:
        lines += [f"noised states x_t, v*    {clips}   t [{n}, {f}]"]
    lines += [f"student tokens           [{plan.student_batch[1]}, {2 * tokens}, {shape.dim}]   layout [clean | noisy]"]
    if passes.guide is not None:
        what = "the discriminator" if passes.guide == "discriminator" else "critic and real score"
        return "\n".join([*lines, f"x0, slope                {clips}   by {what}"])
    roles = ", v_old" * passes.has_old_pass + ", v_ref" * passes.has_prior_pass
    return "\n".join([*lines, f"velocities v{roles}  {clips}"])
