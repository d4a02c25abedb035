"""What a preparation has done, on the disk after every row: killed at any point, it goes on where it was.

A hidden work folder beside the training shards holds `events.jsonl`, one line per finished request, reject and closed
shard, in order; and `<split>.<shard>.rows`, the rows of each split's open shard. A row is written before its line, and
its line has its hash: a line that is cut short, or whose row is not there, was never written. Rows of a shard are
dropped once the shard's own file is in place. Rows outlive a killed process at once, a power cut from the next closed
shard on. A pass that left a split empty is followed by another, which keeps its samples and forgets its rejects.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from afd.data.schema import Reject
from afd.data.writer import EncodedRow

_EVENTS = "events.jsonl"


@dataclass
class SplitState:
    """What is done of one split: closed shards, and the rows of the open one."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    rows: list[EncodedRow] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)
    teachers: set[str] = field(default_factory=set)
    spool_bytes: int = 0


@dataclass
class Progress:
    """What a journal says when it is opened.

    Attributes:
        splits: by name.
        last_number: the highest request number with an event in this pass; -1 before the first.
        num_free: its rejects without a request number.
        num_rejects: all its rejects.
        is_complete: the source was read to its end.
    """

    splits: dict[str, SplitState]
    last_number: int = -1
    num_free: int = 0
    num_rejects: int = 0
    is_complete: bool = False


class Journal:
    """The work folder of one preparation; one process at a time."""

    def __init__(self, folder: Path, fingerprint: str, splits: tuple[str, ...]) -> None:
        """Open or start the work folder.

        Raises:
            ValueError: another process works there, or the folder is of a preparation with other settings.
        """
        self.folder, self._splits = folder, splits
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(f"another preparation is at work in {folder}") from error
        self._header = json.dumps({"fingerprint": fingerprint}) + "\n"
        self._events = folder / _EVENTS
        if self._events.exists() and not self._is_ours():
            os.close(self._lock)
            raise ValueError(
                f"{folder} holds an unfinished preparation with other settings: finish it, choose another output_dir, "
                "or drop it with `afd prepare --overwrite`"
            )
        if not self._events.exists() or self._events.stat().st_size < len(self._header):
            self._events.write_text(self._header)
        self._file: Any = None
        self._pass_start = len(self._header)
        self._spools: dict[str, Any] = {}
        self._shards = dict.fromkeys(splits, 0)

    def _is_ours(self) -> bool:
        with self._events.open() as file:
            return self._header.startswith(file.readline(4096))  # an empty or cut first line is nobody's

    def replay(self) -> tuple[Progress, Iterator[tuple[bytes, str]]]:
        """Read what is done, drop what was cut short, and open the journal for more.

        Returns:
            The progress, and (key, source_id) of every video that may not come again, read from the disk as needed.
        """
        progress, is_whole = self._read_progress()
        while not is_whole:
            progress, is_whole = self._read_progress()
        for path in self.folder.glob("*.rows"):
            if path not in [self._spool_path(name, len(state.entries)) for name, state in progress.splits.items()]:
                path.unlink()
        for split, state in progress.splits.items():
            self._shards[split] = len(state.entries)
            self._open_spool(split, state.spool_bytes)
        self._file = self._events.open("ab")
        return progress, self._keys()

    def _keys(self) -> Iterator[tuple[bytes, str]]:
        for _, event in _read_events(self._events):
            if event.get("key") and "sample" in event:
                yield bytes.fromhex(event["key"]), event["sample"]
        for _, event in _read_events(self._events, self._pass_start):
            if event.get("key") and "reject" in event:
                yield bytes.fromhex(event["key"]), event["reject"]

    def settled(self) -> Iterator[str]:
        """The source_ids of the samples of earlier passes."""
        end = len(self._header)
        for line, event in _read_events(self._events):
            end += len(line)
            if end > self._pass_start:
                return
            if "sample" in event:
                yield event["sample"]

    def _read_progress(self) -> tuple[Progress, bool]:
        """Go through the events; those from the first damaged one on are cut off, and another reading is needed."""
        closed = dict.fromkeys(self._splits, 0)
        for _, event in _read_events(self._events):
            if "shard" in event:
                closed[event["split"]] += 1
        progress = Progress({split: SplitState() for split in self._splits})
        end = self._pass_start = len(self._header)
        for line, event in _read_events(self._events):
            if not self._apply(event, progress, closed):
                break
            end += len(line)
            if "again" in event:
                self._pass_start = end
        is_cut = self._events.stat().st_size > end
        if is_cut:
            with self._events.open("r+b") as file:
                file.truncate(end)
        return progress, not is_cut

    def _apply(self, event: dict[str, Any], progress: Progress, closed: dict[str, int]) -> bool:
        """Count an event; False when its row is not there."""
        if "shard" in event:
            state = progress.splits[event["split"]]
            state.entries.append(event["shard"])
            state.rows, state.spool_bytes = [], 0
            return True
        if "end" in event:
            progress.is_complete = True
            return True
        if "again" in event:
            progress.last_number, progress.num_free, progress.num_rejects, progress.is_complete = -1, 0, 0, False
            return True
        if "sample" in event:
            state = progress.splits[event["split"]]
            is_open = len(state.entries) == closed[event["split"]]
            data = self._read_row(event, len(state.entries), state.spool_bytes) if is_open else b""
            if data is None:
                return False
            state.common = state.common or event["common"]
            state.teachers.add(event["teacher"])
            state.rows.append(EncodedRow(data, event["sample"], event["teacher"], event["common"]))
            state.spool_bytes += len(data)
        else:
            progress.num_rejects += 1
        if event.get("n") is None:
            progress.num_free += 1
        else:
            progress.last_number = max(progress.last_number, event["n"])
        return True

    def _read_row(self, event: dict[str, Any], shard: int, at: int) -> bytes | None:
        """The row of an event of an open shard; None when it is not there, or damaged."""
        path = self._spool_path(event["split"], shard)
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(at)
            data = file.read(event["bytes"])
        return data if xxhash.xxh3_64_hexdigest(data) == event["hash"] else None

    def add_row(
        self, number: int, split: str, row: EncodedRow, closed: dict[str, Any] | None, key: bytes | None
    ) -> None:
        """Note a sample: first the shard it closed, then its row, then its line."""
        if closed is not None:
            for spool in self._spools.values():
                os.fsync(spool.fileno())
            self._append({"split": split, "shard": closed}, sync=True)
            self._spools[split].close()
            self._spool_path(split, self._shards[split]).unlink()
            self._shards[split] += 1
            self._open_spool(split, 0)
        self._spools[split].write(row.data)
        self._append(
            {
                "n": number,
                "sample": row.source_id,
                "split": split,
                "bytes": len(row.data),
                "hash": xxhash.xxh3_64_hexdigest(row.data),
                "teacher": row.teacher,
                "common": dict(row.common),
                "key": key.hex() if key else "",
            }
        )

    def add_reject(self, number: int | None, reject: Reject, key: bytes | None = None) -> None:
        """Note a reject; `key` where its video counts as seen all the same."""
        event = {"n": number, "reject": reject.source_id, "reason": reject.reason, "file": reject.file}
        event |= {} if reject.is_final else {"is_final": False}
        self._append({**event, "key": key.hex()} if key else event)

    def add_end(self) -> None:
        """Note that the source was read to its end."""
        self._append({"end": True}, sync=True)

    def add_again(self) -> None:
        """Note that what was rejected is to be asked for again, by the next process."""
        self._append({"again": True}, sync=True)

    def rejects(self) -> Iterator[Reject]:
        """Every reject of this pass so far, in order."""
        events = (event for _, event in _read_events(self._events, self._pass_start) if "reject" in event)
        return (
            Reject(event["reject"], event["reason"], event["file"], event.get("is_final", True)) for event in events
        )

    def discard(self) -> None:
        """Delete the folder: its work is published."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Close the files and let another process in."""
        for file in (self._file, *self._spools.values()):
            if file is not None:
                file.close()
        os.close(self._lock)

    def _append(self, event: dict[str, Any], *, sync: bool = False) -> None:
        self._file.write(json.dumps(event, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def _open_spool(self, split: str, size: int) -> None:
        path = self._spool_path(split, self._shards[split])
        with path.open("ab") as file:
            file.truncate(size)
        self._spools[split] = path.open("ab", buffering=0)

    def _spool_path(self, split: str, shard: int) -> Path:
        return self.folder / f"{split}.{shard}.rows"


def encoded_teachers(folder: Path) -> set[str]:
    """Whose videos the unfinished preparation of a work folder has encoded; nobody's where there is none."""
    path = folder / _EVENTS
    return {event["teacher"] for _, event in _read_events(path) if "sample" in event} if path.is_file() else set()


def _read_events(path: Path, start: int | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines from a byte on, by default after the header, with what they say."""
    with path.open("rb") as file:
        if start is None:
            file.readline()
        else:
            file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield line, json.loads(line)
            except ValueError:  # zeros after a power cut
                return
