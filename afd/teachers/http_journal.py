"""What has been asked and paid for, on the disk before it happens: one JSON line per event, synced.

    intent     about to submit; from here on the outcome is unknown until a later line says it
    refused    the service has surely not accepted the last intent, which cost nothing; earlier ones stay unknown
    absent     the service knows none of the intents: none cost anything
    submitted  accepted; `captured` holds what polling needs
    failed     accepted, and will never finish; `is_charged` says whether it cost
    done       the video lies in `file`

An intent that no line follows is what a kill between submit and journal leaves. Holds no key and no download address.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["new", "intent", "refused", "submitted", "failed", "done"]
FILE = "journal.jsonl"


@dataclass
class Entry:
    """Where one request stands.

    Attributes:
        stage: the last event.
        num_charged: accepted or possibly accepted submits.
        num_refused: names the next idempotency key, so that a remembered refusal is not repeated.
        intent_unix_s, key_unix_s: times of the last intent, and of the first with the present idempotency key.
        captured: what later calls need.
        reason: of a failure.
        file, sha256: of the video.
    """

    stage: Stage = "new"
    num_charged: int = 0
    num_refused: int = 0
    intent_unix_s: float = 0.0
    key_unix_s: float = 0.0
    is_last_charged: bool = False
    captured: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    file: str = ""
    sha256: str = ""


class BudgetUsedUpError(Exception):
    """No further submit may be charged."""


class Journal:
    """The journal of one work folder, held by one process at a time; its methods are safe to call from threads."""

    def __init__(self, folder: Path, *, max_calls: int | None, max_cost: float | None, cost_per_call: float) -> None:
        """Open and replay; a torn last line, which nothing can have relied on, is cut off.

        Raises:
            ValueError: another process holds the folder, or a line inside the journal is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = folder / FILE, threading.Lock()
        self._max_calls, self._max_cost, self.cost_per_call = max_calls, max_cost, cost_per_call
        self.entries: dict[str, Entry] = {}
        self.num_charged = 0
        self._file = self.path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{folder} is in use by another process: two would pay twice") from error
        try:
            self._replay()
        except ValueError:
            self._file.close()
            raise
        _sync_folder(folder)

    @property
    def cost(self) -> float:
        """What was charged, or may have been."""
        return self.num_charged * self.cost_per_call

    def entry(self, name: str) -> Entry:
        """Where a request stands; a new one is made for an unknown name."""
        with self._lock:
            return self.entries.setdefault(name, Entry())

    def intend(self, name: str, *, is_charged: bool, prompt: str, seed: int) -> Entry:
        """Write the intent to submit before the submit.

        Args:
            is_charged: False for the repetition of a submit that was counted already (same idempotency key).
        Raises:
            BudgetUsedUpError: it would exceed max_calls or max_cost; nothing was written.
        """
        with self._lock:
            after = self.num_charged + is_charged
            if is_charged and self._max_calls is not None and after > self._max_calls:
                raise BudgetUsedUpError(f"teacher.http.max_calls {self._max_calls} is used up")
            if is_charged and self._max_cost is not None and after * self.cost_per_call > self._max_cost * (1 + 1e-12):
                raise BudgetUsedUpError(f"teacher.http.max_cost {self._max_cost:g} is used up")
            return self._write(name, "intent", is_charged=is_charged, prompt=prompt, seed=seed)

    def refused(self, name: str, reason: str) -> Entry:
        """The last intent was surely not accepted."""
        with self._lock:
            return self._write(name, "refused", reason=reason)

    def absent(self, name: str) -> Entry:
        """The service has been asked, and knows of no intent."""
        with self._lock:
            return self._write(name, "absent")

    def submitted(self, name: str, captured: dict[str, Any]) -> Entry:
        """The service has taken it."""
        with self._lock:
            return self._write(name, "submitted", captured=captured)

    def failed(self, name: str, reason: str, *, is_charged: bool) -> Entry:
        """The service has given it up."""
        with self._lock:
            return self._write(name, "failed", reason=reason, is_charged=is_charged)

    def done(self, name: str, file: str, sha256: str) -> Entry:
        """The video is on the disk."""
        with self._lock:
            return self._write(name, "done", file=file, sha256=sha256)

    def close(self) -> None:
        """Let another process have the folder."""
        self._file.close()

    def _write(self, name: str, event: str, **values: Any) -> Entry:
        record = {"unix_s": round(time.time(), 3), "request": name, "event": event, **values}
        self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._apply(record)

    def _replay(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number} is damaged: repair it, it says what was paid") from error
            end += len(line)
        if end != os.fstat(self._file.fileno()).st_size:
            self._file.truncate(end)

    def _apply(self, record: dict[str, Any]) -> Entry:
        """Advance the state by one event."""
        entry = self.entries.setdefault(record["request"], Entry())
        before, event = entry.num_charged, record["event"]
        if event == "intent":
            entry.is_last_charged = bool(record["is_charged"])
            entry.num_charged += entry.is_last_charged
            entry.intent_unix_s = float(record["unix_s"])
            entry.key_unix_s = entry.key_unix_s if entry.stage == "intent" else entry.intent_unix_s
        elif event == "refused":
            entry.num_charged -= entry.is_last_charged
            entry.is_last_charged = False
            entry.reason = record["reason"]
        elif event == "absent":
            entry.num_charged = 0
        elif event == "submitted":
            entry.captured = record["captured"]
        elif event == "failed":
            entry.num_charged -= not record["is_charged"]
            entry.reason = record["reason"]
        elif event == "done":
            entry.file, entry.sha256 = record["file"], record["sha256"]
        else:
            raise ValueError(f"unknown event {event!r}")
        if event in ("refused", "absent"):
            # A refused repetition says nothing of the submit before it.
            event = "intent" if entry.num_charged else "refused"
            entry.num_refused += event == "refused"
        entry.stage = event
        self.num_charged += entry.num_charged - before
        return entry


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
