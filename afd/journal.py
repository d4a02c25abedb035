"""The files tracking leaves in an output folder: what was measured, what happened, and how far MLflow is behind.

`metrics.jsonl` holds one JSON object a line with `step`, `time_unix_s` and the metrics, in step order. `events.jsonl`
lists finished files (`path`, relative to the folder) and changes of the run's `status`. `tracking.json` holds the byte
offsets up to which MLflow has both. Sending is `afd.tracking`'s; here is no network and no MLflow.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
STATE = "tracking.json"


@dataclass(frozen=True)
class TrackingState:
    """How far MLflow is behind the journals; saved as `tracking.json`.

    Attributes:
        experiment, run_name: names in MLflow.
        params, tags: strings, sent once.
        tracking_uri: None means the SQLite file beside the journal, so that the folder may be moved.
        run_id: MLflow's id once the run exists there.
        described: params and tags have been sent.
        metrics_offset, events_offset: bytes of each journal that have been sent.
        resend_from_step: after a resume MLflow already holds the steps before this one; they are not sent twice.
    """

    experiment: str
    run_name: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None
    run_id: str | None = None
    described: bool = False
    metrics_offset: int = 0
    events_offset: int = 0
    resend_from_step: int = 0


def count_unsent(output_dir: Path) -> int:
    """Count the journal records that MLflow has not taken."""
    state = read_state(output_dir)
    metrics = sum(1 for _ in read_records(output_dir / METRICS, state.metrics_offset))
    return metrics + sum(1 for _ in read_records(output_dir / EVENTS, state.events_offset))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`: one dict a record, in order; a torn last line is left out."""
    return [record for record, _ in read_records(path, 0)]


def open_journals(output_dir: Path, fresh: TrackingState, resumed_step: int | None) -> TrackingState:
    """Cut the journal back to the resumed step, or set an older one aside; return the state to go on with."""
    journal = output_dir / METRICS
    is_known = (output_dir / STATE).is_file()
    if resumed_step is None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() % 10**6:06d}"
        for path in (journal, output_dir / EVENTS):
            if path.is_file() and path.stat().st_size:
                path.rename(path.with_name(f"{path.stem}.before-{stamp}.jsonl"))
        return fresh
    previous = read_state(output_dir) if is_known else fresh
    kept, last_sent_step = 0, 0
    for record, offset in read_records(journal, 0):
        if record["step"] <= resumed_step:
            kept = offset
        if offset <= previous.metrics_offset:
            last_sent_step = record["step"]
    if journal.is_file():
        os.truncate(journal, kept)
    if previous.tracking_uri != fresh.tracking_uri:
        return fresh
    if previous.metrics_offset > kept:
        last_sent_step = max(last_sent_step, previous.resend_from_step)
        previous = replace(previous, metrics_offset=kept, resend_from_step=last_sent_step)
    return previous


def read_records(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each complete record after `offset` with the byte offset that follows it."""
    if not path.is_file():
        return
    with path.open("rb") as journal:
        journal.seek(offset)
        for line in journal:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def metric_batches(path: Path, offset: int, *, max_metrics: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Group journal records into requests of at most `max_metrics` metrics (one record at least)."""
    batch: list[dict[str, Any]] = []
    size = 0
    for record, end in read_records(path, offset):
        if batch and size + len(record) > max_metrics:
            yield batch, offset
            batch, size = [], 0
        batch.append(record)
        size += len(record)
        offset = end
    if batch:
        yield batch, offset


def read_state(output_dir: Path) -> TrackingState:
    return TrackingState(**json.loads((output_dir / STATE).read_text(encoding="utf-8")))


def write_state(output_dir: Path, state: TrackingState) -> None:
    temporary = output_dir / f"{STATE}.tmp"
    temporary.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    temporary.replace(output_dir / STATE)


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Let one thread or process at a time change the tracking state of a folder."""
    with (output_dir / f"{STATE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
