"""Shards to batches: an endless, exactly resumable order that is the same for any number of ranks.

`streaming` draws each epoch's order and reads the rows. The order is drawn for one canonical node and one reader;
rank r of a global batch takes its r-th slice, so the global batch is the same samples whatever the world size, and
the position of a run is two numbers. Epochs follow each other without a gap: a batch may hold the end of one and
the start of the next, and every epoch holds every sample once.
"""

import fcntl
import functools
import itertools
import json
import os
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from afd.data.integrity import DatasetRecord, open_dataset
from afd.data.mds import INDEX_FILE
from afd.data.schema import Sample, from_row, load_streaming
from afd.data.store import ShardStore
from afd.distributed import barrier, gather_objects
from afd.types import VideoBatch

CANONICAL_NODES = 1
# streaming shuffles within blocks of this many samples.
SHUFFLE_BLOCK = 1 << 18
_STATE_KEYS = ("epoch", "sample_in_epoch", "shuffle", "shuffle_seed", "num_canonical_nodes", "num_samples", "content")


def build_loader(
    shards: Path,
    *,
    batch_size_per_rank: int,
    world_size: int,
    rank: int,
    seed: int,
    shuffle: bool = True,
    shuffle_block: int = SHUFFLE_BLOCK,
    cache: Path | None = None,
    remote: str | None = None,
    cache_limit: int | None = None,
    verify: str = "start",
) -> "ShardLoader":
    """Verify the shards and open them for training; every rank must call it (for world_size > 1 it is collective).

    Args:
        shards: a folder made by `write_shards`.
        batch_size_per_rank: samples in each batch of this rank; > 0.
        world_size, rank: as in the process group.
        seed: draws the order; in [0, 2**31).
        shuffle: a new order every epoch; otherwise the order of writing.
        shuffle_block: samples that are shuffled together.
        cache: where uncompressed shards go; by default beside the packed ones.
        remote: where shards come from that are not in the folder; they are fetched as they are read.
        cache_limit: bytes that the local copy of a remote may keep; None keeps all.
        verify: "start" checks (and unpacks) all local shards now, "first_use" each when it is first read.
    Raises:
        ValueError: the folder is missing, damaged or hostile; it has fewer samples than one global batch; a number
            is out of range; or world_size > 1 without a process group of that size.
    """
    if batch_size_per_rank < 1 or not 0 <= rank < world_size or not 0 <= seed < 2**31:
        raise ValueError(
            "expected batch_size_per_rank >= 1, 0 <= rank < world_size and 0 <= seed < 2**31, "
            f"got {batch_size_per_rank}, {rank} of {world_size} and {seed}"
        )
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != world_size or (dist.is_initialized() and dist.get_rank() != rank):
        raise ValueError(
            f"rank {rank} of world_size {world_size} needs a process group of that size, got {ranks} ranks"
        )
    if verify not in ("start", "first_use"):
        raise ValueError(f"verify must be 'start' or 'first_use', got {verify!r}")
    store = ShardStore(Path(shards), cache=cache, remote=remote, limit=cache_limit)
    if verify == "start" and remote is None:
        open_dataset(Path(shards), cache)
    record = store.record
    if record.num_samples < batch_size_per_rank * world_size:
        raise ValueError(
            f"{shards} must hold at least one global batch of {batch_size_per_rank} x {world_size} ranks, "
            f"got {record.num_samples} samples"
        )
    dataset = _open_streaming(record.path, batch_size_per_rank * world_size, seed, shuffle, shuffle_block)
    return ShardLoader(dataset, store, batch_size_per_rank=batch_size_per_rank, world_size=world_size, rank=rank)


class ShardLoader(Iterator[VideoBatch]):
    """Endless batches of this rank; `state_dict` is the exact position, valid for any world size."""

    def __init__(
        self, dataset: Any, store: ShardStore, *, batch_size_per_rank: int, world_size: int, rank: int
    ) -> None:
        """Wrap a `streaming.StreamingDataset` of a checked folder; use `build_loader`."""
        self.record, self._store = store.record, store
        self._dataset = dataset
        self._batch_size, self._world_size, self._rank = batch_size_per_rank, world_size, rank
        self._epoch_order = functools.lru_cache(maxsize=2)(self._draw_epoch_order)
        self._num_seen = 0  # samples delivered to all ranks since the first epoch's start
        self._num_ahead = 0
        self._reader: ThreadPoolExecutor | None = None
        self._pending: deque[Future[VideoBatch]] = deque()

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.record.num_samples

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self._num_seen // self.num_samples

    def read_ahead(self, num_batches: int) -> "ShardLoader":
        """Keep num_batches read in a background thread; 0 reads on demand. Order and state are not affected."""
        if num_batches < 0:
            raise ValueError(f"num_batches must be >= 0, got {num_batches}")
        self.close()
        self._num_ahead = num_batches
        return self

    def __next__(self) -> VideoBatch:
        """Return this rank's slice of the next global batch."""
        step = self._batch_size * self._world_size
        if self._num_ahead and self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        if self._reader is None:
            batch = self._read(self._num_seen)
        else:
            while len(self._pending) <= self._num_ahead:
                self._pending.append(self._reader.submit(self._read, self._num_seen + len(self._pending) * step))
            batch = self._pending[0].result()
            self._pending.popleft()
        self._num_seen += step
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch returned, in streaming's words; the same on every rank."""
        return {
            "epoch": self.epoch,
            "sample_in_epoch": self._num_seen % self.num_samples,
            "shuffle": self._dataset.shuffle,
            "shuffle_seed": self._dataset.shuffle_seed,
            "num_canonical_nodes": CANONICAL_NODES,
            "num_samples": self.num_samples,
            "content": self.record.content,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's last batch: no sample of the epoch is repeated or left out.

        Raises:
            ValueError: the state lacks a key or belongs to other shards, another seed or another kind of order.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise ValueError(f"loader state lacks {', '.join(missing)}")
        mine = self.state_dict()
        for key in _STATE_KEYS[2:]:
            if state[key] != mine[key]:
                raise ValueError(f"loader state is of another run: {key} must be {mine[key]!r}, got {state[key]!r}")
        epoch, offset = int(state["epoch"]), int(state["sample_in_epoch"])
        if epoch < 0 or not 0 <= offset < self.num_samples:
            raise ValueError(f"loader state must lie within an epoch, got epoch {epoch}, sample {offset}")
        self.close()
        self._num_seen = epoch * self.num_samples + offset

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it anew."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._reader = None
        self._pending.clear()

    def _draw_epoch_order(self, epoch: int) -> np.ndarray:
        """[num_samples] int64: every sample once, as streaming orders them for one reader."""
        from streaming.base.batching import generate_work
        from streaming.base.world import World

        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        order = generate_work("random", self._dataset, alone, epoch, 0).reshape(-1)
        return order[order >= 0]

    def _read(self, position: int) -> VideoBatch:
        """Read this rank's part of the global batch that starts at `position` samples from the beginning."""
        begin = self._rank * self._batch_size
        ids = self.ids_at(range(position, position + begin + self._batch_size))
        samples = self.samples_at(range(position + begin, position + begin + self._batch_size))
        batch = to_batch([sample for _, sample in samples], [sample_id for sample_id, _ in samples])
        return replace(batch, repeats=count_repeats(ids, begin))

    def ids_at(self, places: Iterable[int]) -> list[int]:
        """Sample ids at places counted from the first epoch's start."""
        epochs = (divmod(place, self.num_samples) for place in places)
        return [int(self._epoch_order(epoch)[offset]) for epoch, offset in epochs]

    def samples_at(self, places: Iterable[int]) -> list[tuple[int, Sample]]:
        """(id, sample) at places counted from the first epoch's start; the loader's own position stays."""
        sample_ids = self.ids_at(places)
        rows = [tuple(map(int, self._dataset.spanner[sample_id])) for sample_id in sample_ids]
        self._store.ensure_all(sorted({shard for shard, _ in rows}))
        return [
            (sample_id, self._read_sample(sample_id, *row)) for sample_id, row in zip(sample_ids, rows, strict=True)
        ]

    @property
    def num_seen(self) -> int:
        """Samples delivered to all ranks since the first epoch's start."""
        return self._num_seen

    def skip(self, num_samples: int) -> None:
        """Move on as if num_samples had been delivered (to all ranks together)."""
        self.close()
        self._num_seen += num_samples

    def _read_sample(self, sample_id: int, shard: int, row: int) -> Sample:
        def read(path: Path) -> Sample:  # one stat before it, unless the file changed since it was verified
            return checked(self._dataset.shards[shard][row], self.record, f"{path}: sample {sample_id}")

        return self._store.read(shard, read)


def iterate(
    shards: Path, cache: Path | None = None, *, remote: str | None = None, cache_limit: int | None = None
) -> Iterator[Sample]:
    """Yield every sample of a folder in the order of writing, each shard verified before it is read.

    Touches no process group and holds one sample at a time.

    Raises:
        ValueError: as `build_loader`.
    """
    store = ShardStore(Path(shards), cache=cache, remote=remote, limit=cache_limit)
    index = json.loads((store.record.path / INDEX_FILE).read_text())
    load_streaming()
    from streaming.base.format.mds.reader import MDSReader

    for number, entry in enumerate(index["shards"]):
        reader = MDSReader.from_json(str(store.record.path), "", entry)
        for row in range(store.record.shards[number].num_samples):
            values = store.read(number, lambda _, reader=reader, row=row: reader[row])
            yield checked(
                values, store.record, f"{store.record.path / store.record.shards[number].raw.name}: row {row}"
            )


def read_all(
    shards: Path, cache: Path | None = None, *, remote: str | None = None, limit: int | None = None
) -> list[Sample]:
    """Every sample of a folder (or the first `limit`), in the order of writing.

    Raises:
        ValueError: as `build_loader`.
    """
    if remote is None:
        open_dataset(Path(shards), cache)
    return list(itertools.islice(iterate(shards, cache, remote=remote), limit))


def count_repeats(sample_ids: Sequence[int], begin: int) -> tuple[int, ...]:
    """How often each id from place `begin` on stands before itself; the places before are other ranks'."""
    seen: Counter[int] = Counter()
    repeats: list[int] = []
    for sample_id in sample_ids:
        repeats.append(seen[sample_id])
        seen[sample_id] += 1
    return tuple(repeats[begin:])


def to_batch(samples: Sequence[Sample], sample_ids: Sequence[int] | None = None) -> VideoBatch:
    """Stack samples of one shape into a float32 batch; ids default to 0, 1, 2, ..."""
    ids = range(len(samples)) if sample_ids is None else sample_ids
    return VideoBatch(
        sample_ids=torch.tensor(list(ids), dtype=torch.int64),
        prompts=tuple(sample.prompt for sample in samples),
        latents=torch.stack([sample.latents for sample in samples]).float(),
        prompt_embeds=torch.stack([sample.prompt_embeds for sample in samples]).float(),
    )


def checked(row: Mapping[str, Any], record: DatasetRecord, label: str) -> Sample:
    """Rebuild a row's sample and compare its shapes with its folder's; errors begin with the label."""
    try:
        sample = from_row(row)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    shapes = tuple(sample.latents.shape), tuple(sample.prompt_embeds.shape)
    if shapes != (record.latent_shape, record.prompt_embeds_shape):
        raise ValueError(
            f"{label}: latents and prompt_embeds must be {list(record.latent_shape)} and "
            f"{list(record.prompt_embeds_shape)}, got {list(shapes[0])} and {list(shapes[1])}"
        )
    return sample


def _open_streaming(path: Path, global_batch: int, seed: int, shuffle: bool, shuffle_block: int) -> Any:
    """Make the StreamingDataset. Its shared memory is claimed under a lock of this machine, so that two runs that
    start together cannot take the same names; names left by a killed run are passed over.
    """
    streaming = load_streaming()
    local_rank, local_size = _place_on_host()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    launch = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    with _environment(launch), _start_lock(held_by_me=local_rank == 0):
        barrier()
        dataset = streaming.StreamingDataset(
            local=str(path),
            batch_size=global_batch,
            shuffle=shuffle,
            shuffle_seed=seed,
            num_canonical_nodes=CANONICAL_NODES,
            shuffle_block_size=shuffle_block,
        )
        barrier()
    return dataset


def _place_on_host() -> tuple[int, int]:
    """This rank's number on its host, and the ranks there. The deepspeed launcher sets no LOCAL_WORLD_SIZE."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0, 1
    hosts = gather_objects(socket.gethostname())
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
    if len(hosts) % len(mine) or mine[-1] - mine[0] + 1 != len(mine):
        raise ValueError(f"ranks must be spread evenly over hosts, one host after the other, got {hosts}")
    return mine.index(dist.get_rank()), len(mine)


@contextmanager
def _environment(values: Mapping[str, int]) -> Iterator[None]:
    """Show `streaming` the process group through the variables it reads, and put them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _start_lock(*, held_by_me: bool) -> Iterator[None]:
    """Hold this user's machine-wide lock in one process per host; the kernel frees it when its holder dies."""
    if not held_by_me:
        yield
        return
    path = Path(tempfile.gettempdir(), f"afd-streaming-{os.getuid()}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
