"""The shards of a run, and small parts that arrive while it trains: one order, the same on every rank.

A part is a shard folder `part-00000`, `part-00001`, ... that appears whole. Every rank opens and verifies parts in a
thread; at a boundary (every `check_every` batches) all ranks take up the parts that all of them have opened. What was
taken up when is logged by rank 0 before it is used, and a resumed run takes up the same parts at the same boundaries.
Leaves out who writes the parts (afd.live) and the order of the base shards (loader.py).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from afd.data.integrity import DatasetRecord, open_dataset, verify_file
from afd.data.loader import ShardLoader, checked, count_repeats, to_batch
from afd.data.schema import Sample, load_streaming
from afd.data.writer import DATASET_FILE
from afd.distributed import gather_objects
from afd.types import VideoBatch

_LOOK_EVERY_S = 0.2
_COUNTERS = ("num_batches", "num_parts", "credit", "num_fresh", "cycle", "cycle_size", "cycle_place")

logger = logging.getLogger(__name__)


def part_folder(cache: Path, number: int) -> Path:
    """Where the number-th part is, or will be."""
    return cache / f"part-{number:05d}"


@dataclass(frozen=True)
class LiveRules:
    """How live samples are mixed in.

    Args:
        check_every: batches between two looks for new parts.
        max_wait_s: longest wait of a batch for the first part while there is none, s.
        share: part of the samples that is live; None takes it in proportion to the numbers of samples.
    """

    check_every: int = 10
    max_wait_s: float = 0.0
    share: float | None = None


@dataclass
class _Position:
    """Where the order stands; equal on all ranks.

    Attributes:
        num_parts: taken up.
        credit: live samples owed, in [0, 1).
        num_fresh: live samples delivered for the first time: arrivals come first, in their order.
        cycle, cycle_size, cycle_place: afterwards the samples of that many arrivals repeat, shuffled anew each cycle.
    """

    num_batches: int = 0
    num_parts: int = 0
    credit: float = 0.0
    num_fresh: int = 0
    cycle: int = 0
    cycle_size: int = 0
    cycle_place: int = 0


class LiveLoader(Iterator[VideoBatch]):
    """Endless batches of this rank from base shards and arriving parts.

    Args:
        base: the run's own shards; its order stays as it is, with live samples put in between.
        cache: folder of the parts; every rank sees it.
        arrivals: JSON-lines file of what was taken up when; written by rank 0.
        batch_size_per_rank, world_size, rank, seed: as in `build_loader`.
    """

    def __init__(
        self,
        base: ShardLoader,
        cache: Path,
        arrivals: Path,
        rules: LiveRules,
        *,
        batch_size_per_rank: int,
        world_size: int,
        rank: int,
        seed: int,
    ) -> None:
        self.base, self._rules, self._arrivals = base, rules, arrivals
        self._batch_size, self._world_size, self._rank, self._seed = batch_size_per_rank, world_size, rank, seed
        self._position = _Position()
        self._opener = _PartOpener(cache, base.record)
        self._logged = _read_arrivals(arrivals) if rank == 0 else {}
        self._order = functools.lru_cache(maxsize=1)(self._draw_order)
        self._wait_s = 0.0
        self._num_ahead = 0
        self._reader: ThreadPoolExecutor | None = None
        # Batches being read, each with the position and the base's place after it.
        self._pending: deque[tuple[Future[VideoBatch], _Position, int]] = deque()

    def read_ahead(self, num_batches: int) -> LiveLoader:
        """Keep num_batches read in a background thread, but never beyond the next look for parts; 0 reads on demand."""
        self._stop_reading()
        self._num_ahead = num_batches
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shards") if num_batches else None
        return self

    def __next__(self) -> VideoBatch:
        """Return this rank's slice of the next global batch."""
        if not self._pending:
            if self._position.num_batches % self._rules.check_every == 0:
                self._take_up_parts()
            self._plan()
        batch, position, place = self._pending[0]
        delivered = batch.result()
        self._pending.popleft()
        self.base.skip(place - self.base.num_seen)
        self._position = position
        last = position
        while len(self._pending) < self._num_ahead and last.num_batches % self._rules.check_every:
            last = self._plan()
        return delivered

    def _plan(self) -> _Position:
        """Choose the samples of the batch after the last one planned, and start reading this rank's part of them."""
        before, place = self._pending[-1][1:] if self._pending else (self._position, self.base.num_seen)
        position, slots = replace(before), []
        for _ in range(self._batch_size * self._world_size):
            live = self._next_live(position)
            slots.append((live, place))
            place += live is None
        position.num_batches += 1
        begin = self._rank * self._batch_size
        upto = slots[: begin + self._batch_size]  # before this rank's: only to count repeats
        batch: Future[VideoBatch] = Future()
        if self._reader is None:
            batch.set_result(self._read(upto, begin))
        else:
            batch = self._reader.submit(self._read, upto, begin)
        self._pending.append((batch, position, place))
        return position

    @property
    def num_live(self) -> int:
        """Live samples taken up."""
        return self._opener.num_samples(self._position.num_parts)

    @property
    def share(self) -> float:
        """Part of the samples that is live now."""
        return self._share(self.num_live)

    def _share(self, num_live: int) -> float:
        given = self._rules.share if num_live else 0.0
        return num_live / (num_live + self.base.num_samples) if given is None else given

    def metrics(self) -> dict[str, float]:
        """What to record with a step: live samples, their share, how many were never used, and the last wait."""
        return {
            "live/samples": float(self.num_live),
            "live/share": self.share,
            "live/unused": float(self.num_live - self._position.num_fresh),
            "live/wait_s": self._wait_s,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch; the same on every rank."""
        content = [self._opener.part(number).record.content for number in range(self._position.num_parts)]
        return {"base": self.base.state_dict(), "live": asdict(self._position), "parts": content}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's last batch.

        Raises:
            ValueError: a part it was trained on is missing or another one, or the base shards are.
        """
        if set(state) != {"base", "live", "parts"} or set(state["live"]) != set(_COUNTERS):
            raise ValueError("loader state is of a run without teacher.live, or of another version")
        self.read_ahead(self._num_ahead)
        self.base.load_state_dict(state["base"])
        for number, content in enumerate(state["parts"]):
            found = self._opener.part(number).record.content
            if found != content:
                raise ValueError(f"live part {number} must be {content[:12]}, got {found[:12]}: another cache?")
        self._position = _Position(**state["live"])

    def close(self) -> None:
        """Stop looking for parts and reading ahead."""
        self._stop_reading()
        self._opener.close()
        self.base.close()

    def _take_up_parts(self) -> None:
        """Agree on the parts to use from this batch on; collective."""
        begin, batch = time.monotonic(), self._position.num_batches
        logged = self._logged.get(batch)
        if logged is None and self._position.num_parts == 0:
            while self._opener.num_open == 0 and time.monotonic() - begin < self._rules.max_wait_s:
                time.sleep(min(0.02, self._rules.max_wait_s))
        offers = gather_objects((logged, self._opener.num_open))
        logged = offers[0][0]
        count = max(self._position.num_parts, min(num_open for _, num_open in offers)) if logged is None else logged
        for number in range(self._position.num_parts, count):
            self._opener.part(number)  # opened already, unless a resumed run repeats what was logged
        if self._rank == 0 and self._logged.get(batch) is None:
            _append(self._arrivals, {"batch": batch, "num_parts": count})
            if count > self._position.num_parts:
                logger.info("batch %d: %d live parts, %d new", batch, count, count - self._position.num_parts)
        self._position.num_parts = count
        self._wait_s = time.monotonic() - begin

    def _next_live(self, position: _Position) -> int | None:
        """The live sample of the slot at `position`, which moves on, or None where the slot is the base's."""
        num_live = self._opener.num_samples(position.num_parts)
        position.credit += self._share(num_live)
        if position.credit < 1.0:
            return None
        position.credit -= 1.0
        if position.num_fresh < num_live:
            position.num_fresh += 1
            return position.num_fresh - 1
        if position.cycle_place >= position.cycle_size:
            position.cycle, position.cycle_size, position.cycle_place = position.cycle + 1, num_live, 0
        position.cycle_place += 1
        return int(self._order(position.cycle, position.cycle_size)[position.cycle_place - 1])

    def _draw_order(self, cycle: int, size: int) -> np.ndarray:
        return np.random.default_rng([self._seed, cycle]).permutation(size)

    def _read(self, upto: Sequence[tuple[int | None, int]], begin: int) -> VideoBatch:
        """Read slots from `begin` on: (live sample or None, the base's place); live ids follow the base's."""
        slots = upto[begin:]
        base = iter(self.base.samples_at(place for live, place in slots if live is None))
        first = self.base.num_samples
        read = [next(base) if live is None else (first + live, self._opener.sample(live)) for live, _ in slots]
        base_ids = iter(self.base.ids_at(place for live, place in upto if live is None))
        ids = [next(base_ids) if live is None else first + live for live, _ in upto]
        batch = to_batch([sample for _, sample in read], ids[begin:])
        return replace(batch, repeats=count_repeats(ids, begin))

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._reader = None
        self._pending.clear()


@dataclass(frozen=True)
class _Part:
    record: DatasetRecord
    rows: Any  # streaming.LocalDataset
    begin: int  # live samples in the parts before it

    def sample(self, row: int) -> Sample:
        count = 0
        for shard in self.record.shards:
            count += shard.num_samples
            if row < count:
                verify_file(self.record.path / shard.raw.name, shard.raw)
                break
        return checked(self.rows[row], self.record, f"{self.record.path}: sample {row}")


class _PartOpener:
    """Opens and verifies parts in their order, in a thread, as they appear."""

    def __init__(self, cache: Path, base: DatasetRecord) -> None:
        self._cache, self._base = cache, base
        self._parts: list[_Part] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._problem: ValueError | None = None
        self._thread = threading.Thread(target=self._watch, name="live-parts", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Parts opened.

        Raises:
            ValueError: the next part is damaged, or does not fit the base shards.
        """
        if self._problem is not None:
            raise self._problem
        return len(self._parts)

    def part(self, number: int) -> _Part:
        """The number-th part, opened now if it was not.

        Raises:
            ValueError: it is missing, damaged, or does not fit the base shards.
        """
        with self._lock:
            while number >= len(self._parts):
                self._open_next()
        return self._parts[number]

    def num_samples(self, num_parts: int) -> int:
        """Samples of the first num_parts parts."""
        if num_parts == 0:
            return 0
        last = self._parts[num_parts - 1]
        return last.begin + last.record.num_samples

    def sample(self, live: int) -> Sample:
        """The live-th sample over all parts."""
        low, high = 0, len(self._parts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._parts[middle].begin <= live else (low, middle)
        return self._parts[low].sample(live - self._parts[low].begin)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                with self._lock:
                    is_there = (part_folder(self._cache, len(self._parts)) / DATASET_FILE).is_file()
                    if is_there:
                        self._open_next()
            except ValueError as error:
                self._problem = error  # told where it can be raised: at the next boundary
                return
            if not is_there:
                self._stop.wait(_LOOK_EVERY_S)

    def _open_next(self) -> None:
        """Open the part after the last one; the caller holds the lock."""
        number = len(self._parts)
        record = open_dataset(part_folder(self._cache, number))
        shapes = (record.latent_shape, record.prompt_embeds_shape, record.fps)
        expected = (self._base.latent_shape, self._base.prompt_embeds_shape, self._base.fps)
        if shapes != expected:
            raise ValueError(f"{record.path}: latents, prompt_embeds and fps must be {expected}, got {shapes}")
        rows = load_streaming().LocalDataset(str(record.path))
        self._parts.append(_Part(record, rows, self.num_samples(number)))


def _read_arrivals(path: Path) -> dict[int, int]:
    """Batch number -> parts in use from it on, as an earlier process of this run logged them."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    if records and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]))
    return {record["batch"]: record["num_parts"] for record in records}


def _append(path: Path, record: dict[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
