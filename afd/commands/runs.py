"""`afd report` and `afd track`: what a run left in its output folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    report = commands.add_parser("report", help="rebuild report.html of a run's output folder")
    report.add_argument("output_dir", type=Path)
    report.set_defaults(run=_report)

    track = commands.add_parser("track", help="experiment tracking")
    actions = track.add_subparsers(required=True, metavar="ACTION")
    sync = actions.add_parser("sync", help="send to MLflow what a run could not send")
    sync.add_argument("output_dir", type=Path)
    sync.set_defaults(run=_track_sync)


def _report(arguments: argparse.Namespace) -> None:
    from afd.evaluation.report import build_report

    print(build_report(arguments.output_dir))


def _track_sync(arguments: argparse.Namespace) -> None:
    from afd.tracking import sync

    summary = sync(arguments.output_dir)
    print(f"run {summary.run_id}: sent {summary.num_records} records and {summary.num_artifacts} artifacts")
