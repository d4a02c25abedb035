"""`afd sample`: videos from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from afd.config_file import ConfigError


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    sample = commands.add_parser("sample", help="generate a video from a checkpoint")
    sample.add_argument("--checkpoint", type=Path, required=True, help="a commit, or a run's output folder")
    sample.add_argument("--prompt", required=True)
    sample.add_argument("--out", type=Path, required=True, help="mp4 to write")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--weights", default="ema", help="ema, old, reference (the base student) or raw")
    sample.add_argument("--scale", type=int, default=8, help="enlarge tiny videos for watching")
    sample.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    from afd.sampling import sample_video
    from afd.train.restore import load_commit, resolve_commit

    if arguments.out.suffix != ".mp4" or not arguments.out.parent.is_dir():
        raise ConfigError(f"--out must name an .mp4 in an existing folder, got {arguments.out}")
    average = None if arguments.weights == "raw" else arguments.weights
    student, config = load_commit(resolve_commit(arguments.checkpoint), average=average)
    sample_video(student, config, arguments.prompt, arguments.out, seed=arguments.seed, scale=arguments.scale)
    print(arguments.out)
