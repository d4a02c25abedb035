"""`afd evaluate`: a checkpoint on the held-out prompts, by one process or by many."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from afd.config_file import ConfigError, load_config


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on the held-out prompts")
    evaluate.add_argument("--checkpoint", type=Path, required=True, help="a commit, or a run's output folder")
    evaluate.add_argument("--weights", default="ema", help="ema, old, reference (the base student) or raw")
    evaluate.add_argument(
        "--out",
        type=Path,
        help="JSON to write, over an older one (default: evaluation-WEIGHTS.json in the commit's run)",
    )
    evaluate.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="over the run's own configuration"
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from afd.data.loader import read_all, to_batch
    from afd.distributed import close_world, init_world
    from afd.evaluation.heldout import HeldoutEvaluator, without_nan
    from afd.evaluation.metric_facts import terminal_table
    from afd.models.encoders import load_codec
    from afd.models.weights.sources import CONFIG
    from afd.preparation import shard_places
    from afd.train.restore import load_commit, resolve_commit

    commit = resolve_commit(arguments.checkpoint).resolve()
    out = _checked_out(arguments.out or commit.parent.parent / f"evaluation-{arguments.weights}.json")
    config = load_config(commit / CONFIG, arguments.overrides)
    student, _ = load_commit(commit, average=None if arguments.weights == "raw" else arguments.weights)
    folder, remote = shard_places(config)[1]
    read = to_batch(read_all(folder, remote=remote, limit=config.evaluation.max_prompts))
    world = init_world(config.timeout_s)
    try:
        evaluator = HeldoutEvaluator(
            read.to(world.device), load_codec(config.encoders, device=world.device), config, world
        )
        roles = {"student": evaluator.evaluate(student.to(world.device)), "teacher": evaluator.evaluate_teacher()}
    finally:
        close_world()
    if world.is_main:
        how = {"commit": commit.name, "weights": arguments.weights, "overrides": arguments.overrides}
        print(f"{terminal_table(roles)}\n", flush=True)
        out.write_text(json.dumps({**how, **without_nan(roles)}, indent=2, allow_nan=False) + "\n")
        print(out)


def _checked_out(out: Path) -> Path:
    """The file to write, refused before anything is measured where it cannot be.

    Raises:
        ConfigError: it is a folder, or its own folder is missing or may not be written.
    """
    if out.is_dir():
        raise ConfigError(f"--out must be a JSON file to write, got the folder {out}")
    if not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"--out must be a file that can be written, in an existing folder, got {out}")
    return out
