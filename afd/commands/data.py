"""`afd prepare`: teacher videos to shards."""

from __future__ import annotations

import argparse
from typing import Any

from afd.commands.options import add_config
from afd.config_file import load_config


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    prepare = commands.add_parser("prepare", help="query the teacher and write its videos as shards")
    add_config(prepare)
    prepare.add_argument("--overwrite", action="store_true", help="replace shards made with other settings")
    prepare.set_defaults(run=_prepare)


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
