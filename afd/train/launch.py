"""Starts a run: what `launch/train.py` and `afd train` share, from parsed arguments to exit code."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from afd.argument_parser import ArgumentParser
from afd.config import RunConfig, Section
from afd.config_file import ConfigError, load_config
from afd.data.integrity import open_dataset
from afd.data.store import ShardStore
from afd.distributed import (
    World,
    adopt_slurm_task,
    barrier,
    broadcast_object,
    close_world,
    init_world,
    set_timeouts,
    world_rank,
    world_size,
)
from afd.evaluation.report import terminal_table
from afd.live import LiveTeacher
from afd.models.encoders import load_codec
from afd.preparation import prepare_shards, shard_places
from afd.stopping import MARKER, STOPPED, StopRequest, catch_stop_signals, write_marker
from afd.teachers.sources import default_work_dir
from afd.tracking import JournalTracker, MLflowTracker, NullTracker, Tracker
from afd.train.checkpoint import find_commit
from afd.train.commit import RunLock, list_commits, read_manifest, set_aside_run
from afd.train.ds_config import DSConfig, load_ds_config
from afd.train.preflight import RunPlan, describe_plan, plan_run
from afd.train.restore import check_resumable

logger = logging.getLogger(__name__)

USER_ERROR = 2


def build_parser() -> ArgumentParser:
    """Arguments of the training command."""
    parser = ArgumentParser(
        prog="launch/train.py", description="Distil a black-box video teacher into a causal student (AFD)."
    )
    parser.add_argument("--ds_config", "--deepspeed_config", type=Path, default=Path("configs/zero3.json"),
                        help="DeepSpeed JSON of the student's engine (default: %(default)s)")  # fmt: skip
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"),
                        help="YAML configuration (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output_dir", help="where the run is written (overrides the configuration)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in the output folder; the default when it holds a commit")  # fmt: skip
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over; an earlier run in the folder is set aside, not its data and teacher",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would run and stop; touches nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="dotted overrides")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code: 0, 2 for wrong input (said in one line), or STOPPED."""
    adopt_slurm_task()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        return _run(build_parser().parse_intermixed_args(argv))
    except (ConfigError, ValueError, OSError) as error:
        if os.environ.get("AFD_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if world_size() > 1:  # any rank may be the one that fails; the others then die of its silence
            sys.stderr.write(f"error (rank {world_rank()} on {platform.node()}): {text}\n")
        elif rank == 0:  # preflight: all fail alike
            sys.stderr.write(f"error: {text}\n")
        return USER_ERROR
    finally:
        close_world()


def _run(arguments: argparse.Namespace) -> int:
    if arguments.resume and arguments.fresh:
        raise ConfigError("--resume and --fresh contradict each other, got both")
    config = load_config(arguments.config, arguments.overrides, output_dir=arguments.output_dir)
    ds_student = load_ds_config(arguments.ds_config)
    ds_discriminator = load_ds_config(config.discriminator.ds_config)
    plan = plan_run(
        config,
        ds_student,
        ds_discriminator,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        is_fresh=arguments.fresh,
    )
    if arguments.resume and not list_commits(config.output_dir / "checkpoints"):
        raise ConfigError(f"--resume: {config.output_dir / 'checkpoints'} must hold a commit, got none")
    RunLock(config.output_dir).check()
    if arguments.fresh:
        _kept_paths(config)
    else:
        check_resumable(config, plan)
    if config.teacher.kind != "physics":
        _check_shard_shapes(config, plan)
    if arguments.dry_run:
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stdout.write(describe_plan(config, plan, ds_student) + "\n")
        return 0
    return _train(config, plan, ds_student, ds_discriminator, is_fresh=arguments.fresh)


def _kept_paths(config: RunConfig) -> list[Path]:
    """What outlives a run: shards, the teacher's journal and videos, and every path that their sections name.

    Raises:
        ConfigError: one is the output folder itself.
    """
    kept, sections = [config.output_dir / "data", default_work_dir(config)], [config.teacher, config.data]
    while sections:
        values = [value for _, value in sections.pop()]
        sections += [value for value in values if isinstance(value, Section)]
        kept += [value for value in values if isinstance(value, Path)]
    if config.output_dir.resolve() in [path.resolve() for path in kept]:
        raise ConfigError(
            f"--fresh would set aside what the teacher or the data section keeps in {config.output_dir} itself: "
            "choose another output_dir"
        )
    return kept


def _train(
    config: RunConfig, plan: RunPlan, ds_student: DSConfig, ds_discriminator: DSConfig, *, is_fresh: bool
) -> int:
    stop = catch_stop_signals()
    stop.grace_s = config.stopping.grace_s
    world = init_world(config.timeout_s)
    output = config.output_dir
    with RunLock(output):
        if is_fresh and world.is_main:
            moved = set_aside_run(output, keep=_kept_paths(config))
            if moved is not None:
                logger.info("an earlier run was set aside in %s", moved)
        if world.is_main:
            (output / MARKER).unlink(missing_ok=True)
        barrier()
        stop.output_dir = output
        if config.teacher.kind == "physics":
            _prepare_on_main(config, is_main=world.is_main)
        for folder, remote in shard_places(config):  # before anything of the run is written
            if remote is None and config.data.verify == "start":
                open_dataset(folder)
        commit = find_commit(output / "checkpoints")
        resumed_step = read_manifest(commit)["step"] if commit else None
        # Heavy imports wait until everything cheap has been checked.
        from afd.train.builders import build_roles
        from afd.train.trainer import Trainer

        tracker: Tracker = NullTracker()
        if world.is_main:
            tracker = _open_tracker(config, plan, ds_student, ds_discriminator, resumed_step)
        try:
            with LiveTeacher(config, is_main=world.is_main):
                codec = load_codec(config.encoders, device=world.device)  # one for samples and for a VLM
                roles = build_roles(config, plan, ds_student, ds_discriminator, world=world, codec=codec)
                set_timeouts(config.timeout_s)
                trainer = Trainer(config, plan, roles, tracker, codec=codec, world=world, stop=stop)
                report = trainer.run(_run_facts(plan, world), resume_from=commit)
        except BaseException:
            tracker.close("FAILED")
            raise
        tracker.close("KILLED" if trainer.is_stopped else "FINISHED")
        if trainer.is_stopped:
            return _leave_stopped(output, trainer.step, stop, world)
        stop.disarm()
        if world.is_main:
            sys.stdout.write(f"\n{terminal_table(trainer.evaluation)}\n\nreport: {report}\n")
    return 0


def _leave_stopped(output: Path, step: int, stop: StopRequest, world: World) -> int:
    """Say where a stopped run stands. The ranks leave together: a launcher kills the others when the first one ends."""
    if world.is_main:
        name = stop.signal_name or "a signal to another rank"
        write_marker(output, exit_code=STOPPED, signal_name=name, step=step)
        logger.info("stopped at step %d by %s; the same command goes on from there", step, name)
    barrier()
    stop.disarm()
    return STOPPED


def _check_shard_shapes(config: RunConfig, plan: RunPlan) -> None:
    """Shards made elsewhere must hold what this student reads; reads (and fetches) records only."""
    embeds = (plan.shape.text_len, plan.shape.text_dim)
    for folder, remote in shard_places(config):
        record = ShardStore(folder, remote=remote).record
        for name, expected, got in (
            ("latents", plan.latents, record.latent_shape),
            ("prompt embeddings", embeds, record.prompt_embeds_shape),
        ):
            if got != expected:
                raise ConfigError(f"shards {folder}: {name} must be {list(expected)}, got {list(got)}")


def _prepare_on_main(config: RunConfig, *, is_main: bool) -> None:
    """Write the built-in world's shards on rank 0; a failure reaches every rank instead of hanging them."""
    problem = None
    if is_main:
        try:
            prepare_shards(config, overwrite="built_in")
        except (ValueError, OSError) as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ValueError(problem)


def _open_tracker(
    config: RunConfig, plan: RunPlan, ds_student: DSConfig, ds_discriminator: DSConfig, resumed_step: int | None
) -> Tracker:
    params = {
        **config.model_dump(mode="json", exclude={"pretrain"}),
        "ds_student": ds_student,
        "ds_discriminator": ds_discriminator,
        "ranks": plan.world_size,
    }
    if not config.tracking.mlflow:
        return JournalTracker(config.output_dir, resumed_step=resumed_step)
    return MLflowTracker(
        config.output_dir,
        config.tracking.experiment,
        config.output_dir.name,
        params,
        tags={"commit": _git_commit()},
        resumed_step=resumed_step,
    )


def _run_facts(plan: RunPlan, world: World) -> dict[str, object]:
    """What the report says about where and with what a run was made."""
    names = ("torch", "deepspeed", "transformers", "diffusers", "triton", "mosaicml-streaming", "mlflow-skinny")
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _cpu_name()
    return {
        "started_at": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "ranks": world.size,
        "commit": _git_commit(),
        "student_parameters": plan.num_parameters,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU: {models[0] if models else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def _git_commit() -> str:
    """The checkout's commit, with `-dirty` for uncommitted changes; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
