"""Seconds per phase of a training step (rollout, discriminator, score, update) on random weights of the real shape.

    python benchmarks/step.py --config configs/wan_1_3b_self_forcing.yaml
    torchrun --nproc_per_node 8 benchmarks/step.py --config configs/wan_14b.yaml --rollouts 4

On GPUs: real engines, real size, random weights and latents; seconds, tokens/s, model-FLOPs utilisation, peak memory,
and the rollout's frames/s, without VAE and data loading. Without a GPU the same code runs a tiny model, to show that it
works (nothing about speed), and prints the FLOP and memory model of the real size, from modules on the meta device.
Rows are appended to benchmarks/results/step.csv.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measurement import CPU_WARNING, append_csv, describe_commit, describe_device, describe_versions, measure_ceilings

from afd.config import DiscriminatorShape, RunConfig, StudentShape
from afd.config_file import ConfigError, load_config
from afd.distributed import World, close_world, init_world, seeded_generator
from afd.models.discriminator import LatentDiscriminator
from afd.models.encoders import latent_shape
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.planning.activations import Kernels
from afd.planning.memory import Memory, describe_memory, plan_memory
from afd.planning.operations import discriminator_pass, forward_flops, rollout_passes, student_pass, training_flops
from afd.planning.refusals import batch_arithmetic
from afd.planning.workload import Workload, build_workload, engine_settings
from afd.rollout import chunk_spans, sampler_times
from afd.train.builders import roles_around, train_ready
from afd.train.ds_config import DSConfig, load_ds_config
from afd.train.objectives import StepTimer, afd_step
from afd.types import VideoBatch

RESULTS = Path(__file__).resolve().parent / "results" / "step.csv"
PHASES = ("rollout", "discriminator", "score", "update")
Latents = tuple[int, int, int, int]
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One phase of one setting.

    Attributes:
        size: `real`, or `tiny` for the model that a machine without a GPU runs.
        seconds: median over the steps of the slowest rank.
        tokens_s: tokens generated (rollout), scored, or trained on (both halves) per second over all ranks.
        tflop: model FLOPs of the phase over all ranks, 1e12; recomputation is not counted.
        mfu: those per second and rank over the measured bf16 matmul rate of this device.
        peak_gib: most memory allocated on a rank during the phase; GPUs only.
        planned_gib: what `afd plan` says it should be.
        fps: video frames per second over all ranks; rollout only.
    """

    config: str
    size: str
    ranks: int
    rollouts: int
    phase: str
    seconds: float
    tokens_s: float
    tflop: float
    mfu: float
    peak_gib: float
    planned_gib: float
    fps: float
    device: str
    commit: str
    versions: str


class WatchedTimer(StepTimer):
    """Waits for the device at both ends of a phase, and notes its peak memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.peak_gib: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the enclosed time to a phase."""
        if self.device.type != "cuda":
            with super().phase(name):
                yield
            self.peak_gib[name] = float("nan")
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with super().phase(name):
            yield
            torch.cuda.synchronize(self.device)
        self.peak_gib[name] = torch.cuda.max_memory_allocated(self.device) / GIB


def real_shape(config: RunConfig) -> tuple[StudentShape, Latents]:
    """The student and latents that a configuration describes, without its weights.

    Raises:
        ConfigError: the configuration leaves dimensions to a file, or the video does not fit the student.
    """
    given = config.student.given_shape
    if "num_layers" not in given:
        raise ConfigError("student.num_layers and its other dimensions must be written in the configuration, got none")
    shape = StudentShape(**given)
    try:
        latents = latent_shape(config.encoders.model_copy(update={"vae_path": None}), config.video)
        chunk_spans(shape, latents[1])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if latents[2] % shape.patch_size[1] or latents[3] % shape.patch_size[2]:
        raise ConfigError(
            f"video.height and video.width must give latents divisible by the student's patch "
            f"{list(shape.patch_size[1:])}, got latents {latents[2]} x {latents[3]}"
        )
    return shape, latents


def tiny(config: RunConfig, shape: StudentShape) -> tuple[RunConfig, StudentShape, Latents]:
    """The same run with a model that a CPU steps in a second: chunks, window, steps and modes stay."""
    small = {"num_layers": 2, "num_heads": 2, "head_dim": 12, "ffn_dim": 48, "freq_dim": 16, "text_len": 8}
    shape = shape.model_copy(update={**small, "text_dim": 32})
    frames = (shape.first_chunk_frames or shape.chunk_frames) + 2 * shape.chunk_frames
    size = (2 * shape.patch_size[1], 4 * shape.patch_size[2])
    discriminator = DiscriminatorShape(
        in_channels=shape.out_channels, patch_size=(1, *shape.patch_size[1:]), num_layers=1, text_dim=32
    )
    lora = config.student.lora.model_copy(update={"rank": min(config.student.lora.rank, 4), "alpha": 4})
    section = config.student.model_copy(update={**small, "text_dim": 32, "lora": lora})
    changed = {"student": section, "discriminator": config.discriminator.model_copy(update={"shape": discriminator})}
    return config.model_copy(update=changed), shape, (shape.out_channels, frames, *size)


def ds_configs(arguments: argparse.Namespace, config: RunConfig, world: World) -> tuple[DSConfig, DSConfig]:
    """Both engines' JSONs for this many rollouts per rank."""
    files = [load_ds_config(arguments.ds_config), load_ds_config(config.discriminator.ds_config)]
    for each in files:
        micro = min(each.get("train_micro_batch_size_per_gpu", 1), arguments.rollouts)
        each |= {"train_batch_size": arguments.rollouts * world.size, "train_micro_batch_size_per_gpu": micro}
        each.pop("gradient_accumulation_steps", None)
    return files[0], files[1]


def random_batch(shape: StudentShape, latents: Latents, world: World) -> VideoBatch:
    """One prompt per rank with a "teacher video" of noise."""
    generator = seeded_generator(17, world.rank)
    video = torch.randn(1, *latents, generator=generator)
    embeds = torch.randn(1, shape.text_len, shape.text_dim, generator=generator)
    return VideoBatch(torch.tensor([world.rank]), ("noise",), video.to(world.device), embeds.to(world.device))


def run_steps(
    config: RunConfig, shape: StudentShape, latents: Latents, files: tuple[DSConfig, DSConfig], steps: int, world: World
) -> list[WatchedTimer]:
    """Real steps; the first, which compiles and warms up, is not returned."""
    with torch.device(world.device):
        torch.manual_seed(0)
        student = train_ready(CausalStudent(shape), config)
        discriminator = LatentDiscriminator(config.discriminator.shape)
    roles = roles_around(student, discriminator, config, *files, world=world)
    batch, timers = random_batch(shape, latents, world), []
    for step in range(steps + 1):
        timer = WatchedTimer(world.device)
        afd_step(roles, batch, config, step, world=world, timer=timer)
        timers.append(timer)
    return timers[1:]


def phase_flops(config: RunConfig, shape: StudentShape, latents: Latents, rollouts: int) -> dict[str, tuple[int, int]]:
    """Per phase of one rank: model FLOPs, and FLOPs executed, which recomputation adds to."""
    section, nft = config.student, config.nft
    lora = section.lora if section.lora.rank else None
    times = sampler_times(config.rollout)
    first = None if times.first_chunk_times is None else len(times.first_chunk_times)
    sampled = rollout_passes(
        shape, latents, batch=rollouts, num_times=len(times.times), lora=lora, first_chunk_times=first
    )
    one = discriminator_pass(config.discriminator.shape, latents, batch=rollouts, text_len=shape.text_len)
    student = student_pass(shape, latents, batch=rollouts, lora=lora)
    is_shared = lora is not None and nft.velocities == "one_gather"
    reference = forward_flops(student_pass(shape, latents, batch=rollouts, lora=None) if is_shared else student)
    lagging = forward_flops(student) * (config.rollout.policy == "ema") + reference * (nft.prior_weight > 0)
    update = [training_flops(student, is_checkpointed=flag) for flag in (False, section.gradient_checkpointing)]
    model, executed = (nft.updates_per_rollout * (flops + lagging) for flops in update)
    pairs = 2 * training_flops(one, is_checkpointed=False) * config.discriminator.steps_per_student_step
    return {
        "rollout": (forward_flops(sampled), forward_flops(sampled)),
        "discriminator": (pairs, pairs),
        "score": (forward_flops(one), forward_flops(one)),
        "update": (model, executed),
    }


def planned_peak(memory: Memory, phase: str) -> float:
    """Bytes at the peak of a timed phase; the planner has none for scoring, which no run is limited by."""
    return memory.timed(phase) or float("nan")


def measured_rows(
    arguments: argparse.Namespace, config: RunConfig, shape: StudentShape, latents: Latents, size: str, world: World,
    timers: list[WatchedTimer], planned: Memory,
) -> list[Row]:  # fmt: skip
    """The table of a run."""
    flops = phase_flops(config, shape, latents, arguments.rollouts)
    peak = measure_ceilings(world.device).matmul_tflop_s * 1e12
    video_tokens = latents[1] * (latents[2] // shape.patch_size[1]) * (latents[3] // shape.patch_size[2])
    tokens = {"rollout": 1, "discriminator": 2, "score": 1, "update": 2 * config.nft.updates_per_rollout}
    video_frames = 1 + 4 * (latents[1] - 1) if config.encoders.codec == "wan_vae" else latents[1]
    rows = []
    for phase in PHASES:
        seconds = statistics.median(timer.seconds[f"time/{phase}_s"] for timer in timers)
        clips = arguments.rollouts * world.size
        rows.append(
            Row(
                config=arguments.config.stem,
                size=size,
                ranks=world.size,
                rollouts=clips,
                phase=phase,
                seconds=round(seconds, 4),
                tokens_s=round(tokens[phase] * video_tokens * clips / seconds, 1),
                tflop=round(flops[phase][0] * world.size / 1e12, 6),
                mfu=round(flops[phase][0] / seconds / peak, 4),
                peak_gib=round(max(timer.peak_gib[phase] for timer in timers), 2),
                planned_gib=round(planned_peak(planned, phase) / GIB, 2),
                fps=round(video_frames * clips / seconds, 2) if phase == "rollout" else float("nan"),
                device=describe_device(world.device),
                commit=describe_commit(),
                versions=describe_versions(),
            )
        )
    return rows


def workload(
    config: RunConfig, shape: StudentShape, latents: Latents, files: tuple[DSConfig, DSConfig], ranks: int,
    kernels: Kernels,
) -> Workload:  # fmt: skip
    """The run as the planner sees it: one group of rollouts a rank."""
    batch = {"train_batch_size": config.rollout.group_size * ranks}
    student, discriminator = (engine_settings(each, batch_arithmetic(each | batch, ranks)) for each in files)
    return build_workload(
        config, shape, latents=latents, num_gpus=ranks, engines=(student, discriminator), kernels=kernels
    )


def model_lines(
    config: RunConfig, shape: StudentShape, latents: Latents, files: tuple[DSConfig, DSConfig], ranks: int
) -> list[str]:
    """The FLOP and memory model of the real size; modules are built on the meta device, nothing is allocated."""
    with torch.device("meta"):
        student = CausalStudent(shape)
        base = sum(parameter.numel() for parameter in student.parameters())
        lora = config.student.lora
        if lora.rank:
            add_lora(student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        cache = student.bfloat16().new_cache(1, latents[1], latents[2:], device=torch.device("meta"))
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    adapters = sum(parameter.numel() for parameter in student.parameters()) - base
    tokens = latents[1] * (latents[2] // shape.patch_size[1]) * (latents[3] // shape.patch_size[2])
    work = workload(config, shape, latents, files, ranks, "fused")
    flops = phase_flops(config, shape, latents, 1)
    return [
        f"# model of the real size: {config.student.init_from}, random weights never made",
        f"parameters {base:,}; adapters {adapters:,}; trained {trained:,}",
        f"latents {list(latents)}; {tokens:,} tokens a clip, twice that in the update",
        f"keys and values of one rollout, bf16: {cache.num_bytes / GIB:.2f} GiB",
        *(
            f"{phase:<14}{model / 1e12:>10.1f} TFLOP a rollout,{executed / 1e12:>10.1f} executed"
            for phase, (model, executed) in flops.items()
        ),
        f"# memory of one of {ranks} ranks, {work.rollouts_per_gpu} rollouts each, micro batch {work.student.micro}",
        *describe_memory(plan_memory(work)),
    ]


def print_rows(rows: list[Row]) -> None:
    """The columns a person compares."""
    print(f"{'phase':<14}{'s':>10}{'tokens/s':>12}{'TFLOP':>12}{'MFU':>8}{'peak GiB':>10}{'planned':>9}{'FPS':>9}")
    for row in rows:
        numbers = f"{row.seconds:>10.3f}{row.tokens_s:>12.0f}{row.tflop:>12.4f}{row.mfu:>8.1%}"
        print(f"{row.phase:<14}{numbers}{row.peak_gib:>10.2f}{row.planned_gib:>9.2f}{row.fps:>9.2f}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/wan_1_3b_self_forcing.yaml"))
    parser.add_argument("--ds_config", type=Path, default=Path("configs/zero3_h100.json"))
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts per rank and step, one group; at least 2")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that warms up")
    parser.add_argument("--gpus", type=int, default=8, help="ranks of the memory model, where there is no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to append to")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.rollouts < 2 or arguments.steps < 1:
        raise ConfigError(f"--rollouts must be at least 2 and --steps 1, got {arguments.rollouts}, {arguments.steps}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 2 for wrong input."""
    try:
        arguments = parse_arguments(argv)
        overrides = [*arguments.overrides, f"rollout.group_size={arguments.rollouts}"]
        config = load_config(arguments.config, overrides)
        shape, latents = real_shape(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    world = init_world(1800.0)
    try:
        files: Any = ds_configs(arguments, config, world)
        has_gpu = world.device.type == "cuda"
        if not has_gpu and world.is_main:
            print("\n".join(model_lines(config, shape, latents, files, arguments.gpus)))
        run = (config, shape, latents) if has_gpu else tiny(config, shape)
        timers = run_steps(*run, files, arguments.steps, world)
        planned = plan_memory(workload(*run, files, world.size, "fused" if has_gpu else "eager"))
        rows = measured_rows(arguments, *run, "real" if has_gpu else "tiny", world, timers, planned)
    finally:
        close_world()
    if world.is_main:
        print("" if has_gpu else f"\n# {CPU_WARNING} Tiny model:")
        print_rows(rows)
        append_csv(arguments.out, [asdict(row) for row in rows])
        print(f"appended to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
