"""`afd prepare`, and what one does with shards: `afd verify | stats | merge | preview`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from afd.commands.options import add_config, positive_int
from afd.config_file import load_config


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    prepare = commands.add_parser("prepare", help="write the teacher's videos as shards; goes on where it was killed")
    add_config(prepare)
    prepare.add_argument("--overwrite", action="store_true", help="replace shards made with other settings")
    prepare.set_defaults(run=_prepare)

    verify = commands.add_parser("verify", help="read every byte of shard folders and judge every sample")
    verify.add_argument("shards", type=Path, nargs="+")
    verify.set_defaults(run=_verify)

    stats = commands.add_parser("stats", help="numbers and histograms of a shard folder: stats.json, stats.png")
    stats.add_argument("shards", type=Path)
    stats.add_argument("--out", type=Path, required=True, help="folder to write")
    stats.set_defaults(run=_stats)

    merge = commands.add_parser("merge", help="put shard folders together")
    merge.add_argument("shards", type=Path, nargs="+")
    merge.add_argument("--out", type=Path, required=True, help="folder to write")
    merge.add_argument("--overwrite", action="store_true")
    merge.set_defaults(run=_merge)

    preview = commands.add_parser("preview", help="contact sheet of a shard folder")
    preview.add_argument("shards", type=Path)
    preview.add_argument("--out", type=Path, required=True, help="png to write")
    preview.add_argument("--num", type=positive_int, default=8, help="videos in the sheet")
    preview.set_defaults(run=_preview)


def _prepare(arguments: argparse.Namespace) -> None:
    from afd.evaluation.shard_report import write_summary
    from afd.preparation import prepare_shards, shard_folders
    from afd.preparation.published import has_unsettled

    config = load_config(arguments.config, arguments.overrides)
    written = prepare_shards(config, overwrite=arguments.overwrite, retry=True)
    train, heldout = shard_folders(config)
    folders: dict[str, Path] = {"train": train, "heldout": heldout}
    for split, folder in folders.items():
        summary = written.get(split)
        if summary is None:
            print(f"{split}: {folder} is up to date")
            continue
        print(f"{split}: {summary.num_samples} samples, {summary.num_bytes / 2**20:.1f} MiB, in {folder}")
        if summary.num_rejects:
            print(f"  {summary.num_rejects} rejected, each with its reason in {folder / 'rejects.jsonl'}")
        if has_unsettled(folder):
            print("  the teacher may still give some of them: the same command asks again and adds what comes")
    if written:
        page = write_summary(folders, folders["train"].parent / "summary.html")
        print(f"thumbnails and histograms: {page}")


def _verify(arguments: argparse.Namespace) -> None:
    from afd.data.inspection import inspect

    damaged = []
    for folder in arguments.shards:
        found = inspect(folder)
        size = f"{found.num_samples} samples in {found.num_shards} shards, {found.num_bytes / 2**20:.1f} MiB"
        print(f"{folder}: {size}: {f'{len(found.problems)} problems' if found.problems else 'good'}")
        for problem in found.problems:
            print(f"  {problem}")
        damaged += [str(folder)] if found.problems else []
    if damaged:
        raise ValueError(f"do not train on {', '.join(damaged)}")


def _stats(arguments: argparse.Namespace) -> None:
    from afd.evaluation.shard_report import MEASURES, write_stats

    stats = write_stats(arguments.shards, arguments.out)
    print(f"{stats['num_samples']} samples of {stats['num_prompts']} prompts, {stats['num_bytes'] / 2**20:.1f} MiB")
    for name in MEASURES:
        row = stats[name]
        print(f"  {name:12} median {row['median']:<10.4g} 5 % {row['p05']:<10.4g} 95 % {row['p95']:<10.4g}")
    print(arguments.out / "stats.png")


def _merge(arguments: argparse.Namespace) -> None:
    from afd.data.inspection import merge

    summary = merge(arguments.shards, arguments.out, overwrite=arguments.overwrite)
    size = f"{summary.num_samples} samples, {summary.num_bytes / 2**20:.1f} MiB"
    print(f"{size}, in {summary.path} ({summary.num_rejects} came twice)")


def _preview(arguments: argparse.Namespace) -> None:
    from afd.evaluation.shard_report import write_preview

    print(write_preview(arguments.shards, arguments.out, num_videos=arguments.num))
