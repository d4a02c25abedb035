"""Every byte of a shard folder read and judged, and folders put together. Writes nothing into the folders it reads.

It reads shards by itself (`mds.decode_row`), not through `streaming`: two readers that agree.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from afd.data.integrity import DatasetRecord, ShardRecord, read_offsets, read_packed, read_record, verify_file
from afd.data.mds import decode_row
from afd.data.schema import Reject, Sample, from_row
from afd.data.writer import SHARD_BYTES, ShardSummary, write_shards

# Normalised latents have unit scale and text embeddings stay below a few units: beyond this something went wrong.
MAX_LATENT = 64.0
MAX_EMBEDDING = 1e4
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: counts over what could be read, and every problem by shard and row."""

    record: DatasetRecord
    num_samples: int
    num_shards: int
    num_bytes: int
    problems: tuple[str, ...]


def inspect(shards: Path) -> Inspection:
    """Check hashes, counts, schema, shapes, finiteness, ranges and unique names of a whole folder.

    Raises:
        ValueError: dataset.json or index.json is missing or broken: nothing can be read.
    """
    record = read_record(Path(shards))
    problems: list[str] = []
    names: set[bytes] = set()
    num_samples = num_bytes = 0
    for shard in record.shards:
        stored = shard.packed or shard.raw
        try:
            for row, sample in enumerate(_read_shard(record, shard)):
                num_samples += 1
                name = hashlib.sha256(sample.source_id.encode()).digest()[:16]
                twice = [f"source_id {sample.source_id!r} appears twice"] if name in names else []
                names.add(name)
                problems += [f"{stored.name} row {row}: {text}" for text in [*twice, *judge(sample, record)]]
        except ValueError as error:
            problems.append(f"{stored.name}: {error}")
            continue
        num_bytes += stored.size
    if num_samples != record.num_samples:
        problems.append(f"{record.num_samples} samples are promised, {num_samples} could be read")
    return Inspection(record, num_samples, len(record.shards), num_bytes, tuple(problems))


def read_folder(shards: Path) -> Iterator[Sample]:
    """Yield every sample in the order of writing; nothing is unpacked onto the disk.

    Raises:
        ValueError: as `inspect`, and for the first damaged shard or row.
    """
    record = read_record(Path(shards))
    for shard in record.shards:
        yield from _read_shard(record, shard)


def read_rows(shards: Path, numbers: Collection[int]) -> list[Sample]:
    """The rows of these numbers, counted from 0 in the order of writing; only their shards are read.

    Raises:
        ValueError: as `read_folder`.
    """
    record, begin, rows = read_record(Path(shards)), 0, []
    for shard in record.shards:
        end = begin + shard.num_samples
        if any(begin <= number < end for number in numbers):
            samples = enumerate(_read_shard(record, shard), start=begin)
            rows += [sample for number, sample in samples if number in numbers]
        begin = end
    return rows


def _read_shard(record: DatasetRecord, shard: ShardRecord) -> Iterator[Sample]:
    """Verify one shard's file and yield its rows."""
    stored = shard.packed or shard.raw
    path = record.path / stored.name
    verify_file(path, stored)
    data = read_packed(path, shard) if shard.packed else path.read_bytes()
    digests = {"sha1": hashlib.sha1}
    for algorithm, value in shard.raw.hashes:
        if algorithm in digests and digests[algorithm](data).hexdigest() != value:
            raise ValueError(f"{path} unpacks to other bytes than its {algorithm} promises")
    offsets = read_offsets(data, shard, path)
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        try:
            yield from_row(decode_row(data[begin:end]))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error


def judge(sample: Sample, record: DatasetRecord) -> list[str]:
    """Why a sample must not be trained on; empty when it may."""
    problems = []
    expected = {"latents": record.latent_shape, "prompt_embeds": record.prompt_embeds_shape}
    limits = {"latents": MAX_LATENT, "prompt_embeds": MAX_EMBEDDING}
    for name, shape in expected.items():
        tensor = getattr(sample, name).float()
        if tuple(tensor.shape) != shape:
            problems.append(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has NaN or infinity")
        elif tensor.abs().max() > limits[name]:
            problems.append(f"{name} must lie within +-{limits[name]:g}, got {tensor.abs().max():g}")
        elif not tensor.any():
            problems.append(f"{name} is zero everywhere")
    if sample.fps != record.fps:
        problems.append(f"fps must be {record.fps}, got {sample.fps}")
    if not sample.prompt.strip() or not sample.source_id:
        problems.append("prompt and source_id must not be empty")
    if not _SHA256.fullmatch(sample.sha256):
        problems.append(f"sha256 must be 64 hexadecimal digits, got {sample.sha256[:80]!r}")
    for name in ("motion", "brightness"):
        if not 0 <= getattr(sample, name) <= 1.001:
            problems.append(f"{name} must be in [0, 1], got {getattr(sample, name)}")
    if not 0 <= sample.duration_s < math.inf:
        problems.append(f"duration_s must be finite and >= 0, got {sample.duration_s}")
    return problems


def merge(
    folders: Sequence[Path], out: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> ShardSummary:
    """Write the samples of several folders, in order, as one; what came before (by name or by video) is a reject.

    Every sample is verified and judged on the way.

    Raises:
        ValueError: fewer than two folders, folders of other shapes, fps, codec or text encoder, a damaged shard or
            sample, or `out` exists and overwrite is False.
    """
    if len(folders) < 2:
        raise ValueError(f"merging takes at least two folders, got {len(folders)}")
    records = [read_record(Path(folder)) for folder in folders]
    for record in records[1:]:
        _require_alike(records[0], record)
    metadata = {
        "merged": [{"fingerprint": record.fingerprint, "content": record.content} for record in records],
        **{key: records[0].metadata[key] for key in ("video", "encoders") if key in records[0].metadata},
    }
    samples = _merged(records)
    return write_shards(samples, Path(out), metadata=metadata, overwrite=overwrite, shard_bytes=shard_bytes)


def _require_alike(first: DatasetRecord, other: DatasetRecord) -> None:
    for name in ("latent_shape", "prompt_embeds_shape", "fps"):
        if getattr(first, name) != getattr(other, name):
            raise ValueError(
                f"{other.path}: {name} must be {getattr(first, name)} as in {first.path}, got {getattr(other, name)}"
            )
    for name in ("video", "encoders"):
        if first.metadata.get(name) != other.metadata.get(name):
            raise ValueError(
                f"{other.path}: {name} settings must be {first.metadata.get(name)} as in {first.path}, "
                f"got {other.metadata.get(name)}"
            )


def _merged(records: Sequence[DatasetRecord]) -> Iterator[Sample | Reject]:
    names: set[bytes] = set()
    videos: dict[bytes, str] = {}
    for record in records:
        for sample in read_folder(record.path):
            problems = judge(sample, record)
            if problems:
                raise ValueError(f"{record.path}: {sample.source_id}: {'; '.join(problems)}")
            name, video = hashlib.sha256(sample.source_id.encode()).digest(), bytes.fromhex(sample.sha256)
            key = video + hashlib.sha256(sample.prompt.encode()).digest()
            if name in names:
                yield Reject(sample.source_id, f"in {record.path.name} and in a folder before it")
            elif key in videos:
                yield Reject(sample.source_id, f"the same video and prompt as {videos[key]}")
            else:
                names.add(name)
                videos[key] = sample.source_id
                yield sample
