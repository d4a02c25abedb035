"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path

_DEFAULT_CONFIG = Path("configs/quickstart.yaml")


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and dotted overrides."""
    parser.add_argument("--config", type=Path, default=_DEFAULT_CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
