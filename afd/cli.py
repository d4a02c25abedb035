"""The `afd` command: everything around a training run. The run itself is `deepspeed launch/train.py`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from afd.config_file import ConfigError, load_config

_DEFAULT_CONFIG = Path("configs/quickstart.yaml")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for wrong input, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ConfigError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afd", description="Adversarial Flow Distillation of video models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="query the teacher and write its videos as shards")
    _add_config(prepare)
    prepare.add_argument("--overwrite", action="store_true", help="replace shards made with other settings")
    prepare.set_defaults(run=_prepare)

    sample = commands.add_parser("sample", help="generate a video from a checkpoint")
    sample.add_argument("--checkpoint", type=Path, required=True, help="a commit, or a run's output folder")
    sample.add_argument("--prompt", required=True)
    sample.add_argument("--out", type=Path, required=True, help="mp4 to write")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--weights", default="ema", help="ema, old, reference (the base student) or raw")
    sample.add_argument("--scale", type=int, default=8, help="enlarge tiny videos for watching")
    sample.set_defaults(run=_sample)

    report = commands.add_parser("report", help="rebuild report.html of a run's output folder")
    report.add_argument("output_dir", type=Path)
    report.set_defaults(run=_report)

    pretrain = commands.add_parser("pretrain", help="make the quick start's base student and text encoder")
    _add_config(pretrain)
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write")
    pretrain.set_defaults(run=_pretrain)

    track = commands.add_parser("track", help="experiment tracking")
    actions = track.add_subparsers(required=True, metavar="ACTION")
    sync = actions.add_parser("sync", help="send to MLflow what a run could not send")
    sync.add_argument("output_dir", type=Path)
    sync.set_defaults(run=_track_sync)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=_DEFAULT_CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")


def _prepare(arguments: argparse.Namespace) -> None:
    from afd.preparation import prepare_shards, shard_folders

    config = load_config(arguments.config, arguments.overrides)
    written = prepare_shards(config, overwrite=arguments.overwrite)
    for split, folder in zip(("train", "heldout"), shard_folders(config), strict=True):
        summary = written.get(split)
        if summary is None:
            print(f"{split}: {folder} is up to date")
            continue
        print(f"{split}: {summary.num_samples} samples, {summary.num_bytes / 2**20:.1f} MiB, in {folder}")
        for reject in summary.rejects:
            print(f"  rejected {reject.source_id}: {reject.reason}")


def _sample(arguments: argparse.Namespace) -> None:
    from afd.sampling import sample_video
    from afd.train.restore import load_commit, resolve_commit

    if arguments.out.suffix != ".mp4" or not arguments.out.parent.is_dir():
        raise ConfigError(f"--out must name an .mp4 in an existing folder, got {arguments.out}")
    average = None if arguments.weights == "raw" else arguments.weights
    student, config = load_commit(resolve_commit(arguments.checkpoint), average=average)
    sample_video(student, config, arguments.prompt, arguments.out, seed=arguments.seed, scale=arguments.scale)
    print(arguments.out)


def _report(arguments: argparse.Namespace) -> None:
    from afd.evaluation.report import build_report

    print(build_report(arguments.output_dir))


def _pretrain(arguments: argparse.Namespace) -> None:
    from afd.train.pretrain import make_base_student

    make_base_student(load_config(arguments.config, arguments.overrides), arguments.out)
    print(arguments.out)


def _track_sync(arguments: argparse.Namespace) -> None:
    from afd.tracking import sync

    summary = sync(arguments.output_dir)
    print(f"run {summary.run_id}: sent {summary.num_records} records and {summary.num_artifacts} artifacts")


if __name__ == "__main__":
    sys.exit(main())
