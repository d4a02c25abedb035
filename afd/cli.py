"""The `afd` command: everything around a training run. The run itself is `deepspeed launch/train.py`."""

from __future__ import annotations

import logging
import sys

from afd.argument_parser import ArgumentParser
from afd.commands import data, evaluation, launch, plan, runs, sampling, weights
from afd.config_file import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for wrong input, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments = _build_parser().parse_args(argv)
        arguments.run(arguments)
    except (ConfigError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="afd", description="Adversarial Flow Distillation of video models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for topic in (data, sampling, evaluation, weights, runs, launch, plan):
        topic.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
