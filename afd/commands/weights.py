"""`afd pretrain`: student weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from afd.commands.options import add_config
from afd.config_file import load_config


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    pretrain = commands.add_parser("pretrain", help="make the quick start's base student and text encoder")
    add_config(pretrain)
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write")
    pretrain.set_defaults(run=_pretrain)


def _pretrain(arguments: argparse.Namespace) -> None:
    from afd.train.pretrain import make_base_student

    make_base_student(load_config(arguments.config, arguments.overrides), arguments.out)
    print(arguments.out)
