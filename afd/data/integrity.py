"""Distrust of a shard folder: index.json checked before `streaming` sees it, every shard's size and hash before use.

`streaming` itself follows any basename in the index (a hostile one writes outside the folder), keeps a shard whose
checksum failed, and never re-checks a shard it finds on the disk. Here all files are verified at open, before any
collective, and decompressed once, under a lock, into files that only appear whole.
"""

import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
import zstd

from afd.data.mds import FIXED_SIZES, INDEX_FILE, MAX_SHARD_BYTES, write_whole
from afd.data.schema import COLUMNS, SCHEMA_VERSION
from afd.data.writer import DATASET_FILE

_RAW_NAME = re.compile(r"shard\.[0-9]{5,8}\.mds")
_MAX_INDEX_BYTES = 64 << 20
_MAX_SHARDS = 1 << 20
_MAX_SAMPLES = 1 << 31
_HASHES = {"sha1": hashlib.sha1, "xxh3_64": xxhash.xxh3_64}
_CHUNK = 1 << 22
# Files this process has verified: path -> (size, mtime, inode) at that time.
_verified: dict[Path, tuple[int, int, int]] = {}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """A file as the index promises it."""

    name: str
    size: int
    hashes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its uncompressed file and, where the folder is compressed, the file it comes in."""

    raw: FileRecord
    packed: FileRecord | None
    num_samples: int


@dataclass(frozen=True)
class DatasetRecord:
    """dataset.json and the checked index of one folder."""

    path: Path
    num_samples: int
    latent_shape: tuple[int, ...]
    prompt_embeds_shape: tuple[int, ...]
    fps: float
    fingerprint: str
    metadata: dict[str, Any]
    shards: tuple[ShardRecord, ...]

    @property
    def content(self) -> str:
        """Names the rows themselves: equal for the same shards in any folder, packed or not."""
        return hashlib.sha256(repr([(shard.raw, shard.num_samples) for shard in self.shards]).encode()).hexdigest()


def open_dataset(path: Path, cache: Path | None = None) -> DatasetRecord:
    """Verify a shard folder completely and make its uncompressed shards available.

    Every process verifies for itself (a file once, unless its size, time or inode change); whichever holds the
    lock first decompresses. Nothing here talks to another process.

    Args:
        path: the folder `write_shards` made.
        cache: where the uncompressed shards go (for a read-only or slow folder); by default beside the packed ones.
    Returns:
        The record; its `path` is the folder to read from.
    Raises:
        ValueError: names the folder or file, what was expected and what was found.
    """
    record = read_record(Path(path))
    target = record.path if cache is None else cache_folder(Path(cache), record)
    with lock_folder(target):
        for shard in record.shards:
            unpack_shard(shard, record.path, target)
        if target != record.path:
            write_plain_index(record, target)
    return replace(record, path=target)


def read_record(path: Path) -> DatasetRecord:
    """Read and check dataset.json and index.json, without touching a shard.

    Raises:
        ValueError: a file is missing, broken, or says something it must not.
    """
    path = path.absolute()
    if not path.is_dir():
        raise ValueError(f"{path} must be a folder of shards, got {'a file' if path.exists() else 'nothing there'}")
    described = _read_json(path / DATASET_FILE)
    shards = tuple(_check_index(_read_json(path / INDEX_FILE), path / INDEX_FILE))
    source = path / DATASET_FILE
    if described.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{source}: schema_version must be {SCHEMA_VERSION}, got {described.get('schema_version')!r}")
    total = sum(shard.num_samples for shard in shards)
    if described.get("num_samples") != total or total < 1:
        raise ValueError(f"{source}: num_samples {described.get('num_samples')!r} must be the index's {total}, and > 0")
    latent_shape = _sizes(described.get("latent_shape"), 4, f"{source}: latent_shape")
    embeds_shape = _sizes(described.get("prompt_embeds_shape"), 2, f"{source}: prompt_embeds_shape")
    fps, fingerprint, metadata = (described.get(key) for key in ("fps", "fingerprint", "metadata"))
    if not isinstance(fps, int | float) or not fps > 0 or not isinstance(fingerprint, str):
        raise ValueError(f"{source}: fps must be > 0 and fingerprint a string, got {fps!r} and {fingerprint!r}")
    metadata = metadata if isinstance(metadata, dict) else {}
    return DatasetRecord(path, total, latent_shape, embeds_shape, float(fps), fingerprint, metadata, shards)


def _sizes(value: Any, dims: int, label: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != dims or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"{label} must be {dims} positive integers, got {value!r}")
    return tuple(value)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no shard folder: it has no {path.name}")
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{path} must be at most {_MAX_INDEX_BYTES} bytes, got {path.stat().st_size}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _check_index(index: dict[str, Any], source: Path) -> Iterator[ShardRecord]:
    shards = index.get("shards")
    if index.get("version") != 2 or not isinstance(shards, list) or not 0 < len(shards) <= _MAX_SHARDS:
        got = f"version {index.get('version')!r}, {len(shards) if isinstance(shards, list) else 'no list of'} shards"
        raise ValueError(f"{source} must be version 2 with 1 to {_MAX_SHARDS} shards, got {got}")
    names: set[str] = set()
    for number, entry in enumerate(shards):
        record = _check_shard(entry, f"{source}: shard {number}")
        for name in (record.raw.name, record.packed.name if record.packed else None):
            if name in names:
                raise ValueError(f"{source}: shard {number}: basename {name!r} appears twice")
            names |= {name} if name else set()
        yield record


def _check_shard(entry: Any, label: str) -> ShardRecord:
    if not isinstance(entry, dict) or entry.get("version") != 2 or entry.get("format") != "mds":
        raise ValueError(f"{label} must be an MDS shard of version 2, got {str(entry)[:80]}")
    columns, encodings = entry.get("column_names"), entry.get("column_encodings")
    expected = sorted(COLUMNS)
    if columns != expected:
        raise ValueError(f"{label}: columns must be {expected}, got {columns!r}")
    if encodings != [COLUMNS[name] for name in expected]:
        raise ValueError(f"{label}: column encodings must be the schema's (never pkl), got {encodings!r}")
    sizes = [FIXED_SIZES.get(COLUMNS[name]) for name in expected]
    if entry.get("column_sizes") != sizes:
        raise ValueError(f"{label}: column sizes must be {sizes}, got {entry.get('column_sizes')!r}")
    num_samples = entry.get("samples")
    if type(num_samples) is not int or not 0 < num_samples <= _MAX_SAMPLES:
        raise ValueError(f"{label}: samples must be in [1, {_MAX_SAMPLES}], got {num_samples!r}")
    raw = _check_file(entry.get("raw_data"), f"{label}: raw_data")
    if not _RAW_NAME.fullmatch(raw.name):
        raise ValueError(f"{label}: basename must look like shard.00000.mds, got {raw.name!r}")
    compression, packed = entry.get("compression"), None
    if compression is not None:
        if not isinstance(compression, str) or not re.fullmatch(r"zstd(:[0-9]{1,2})?", compression):
            raise ValueError(f"{label}: compression must be zstd or none, got {compression!r}")
        packed = _check_file(entry.get("zip_data"), f"{label}: zip_data")
        if packed.name != raw.name + ".zstd":
            raise ValueError(f"{label}: basename must be {raw.name}.zstd, got {packed.name!r}")
    elif entry.get("zip_data") is not None:
        raise ValueError(f"{label}: zip_data must be absent without compression")
    return ShardRecord(raw, packed, num_samples)


def _check_file(entry: Any, label: str) -> FileRecord:
    if not isinstance(entry, dict):
        raise ValueError(f"{label} must describe a file, got {entry!r}")
    name, size, hashes = entry.get("basename"), entry.get("bytes"), entry.get("hashes")
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{label}: basename must be a plain file name, got {name!r}")
    if type(size) is not int or not 0 < size <= MAX_SHARD_BYTES:
        raise ValueError(f"{label}: bytes must be in [1, {MAX_SHARD_BYTES}], got {size!r}")
    if not isinstance(hashes, dict) or not set(_HASHES) & set(hashes):
        raise ValueError(f"{label}: hashes must hold one of {sorted(_HASHES)}, got {hashes!r}")
    known = tuple((algorithm, hashes[algorithm]) for algorithm in sorted(_HASHES) if algorithm in hashes)
    return FileRecord(name, size, known)


def unpack_shard(shard: ShardRecord, source: Path, target: Path) -> None:
    """Leave target/<raw> present and verified, from itself or from the verified packed file.

    Raises:
        ValueError: the file it comes in is missing or damaged, or the shard's own offsets make no sense.
    """
    raw = target / shard.raw.name
    if shard.packed is None:
        verify_file(source / shard.raw.name, shard.raw)
        if target != source:
            _drop_if_damaged(raw, shard.raw)
        if not raw.exists():
            write_whole(raw, (source / shard.raw.name).read_bytes())
    else:
        verify_file(source / shard.packed.name, shard.packed)
        _drop_if_damaged(raw, shard.raw)
        if not raw.exists():
            write_whole(raw, read_packed(source / shard.packed.name, shard))
    verify_file(raw, shard.raw)
    with raw.open("rb") as file:
        read_offsets(file.read(4 * (shard.num_samples + 2)), shard, raw)


def read_offsets(head: bytes, shard: ShardRecord, raw: Path) -> tuple[int, ...]:
    """Where a shard's rows begin and the last one ends, from the shard's first 4 (num_samples + 2) bytes.

    Raises:
        ValueError: they are not those of a shard with so many rows and bytes.
    """
    head = head[: 4 * (shard.num_samples + 2)]
    offsets = struct.unpack(f"<{len(head) // 4}I", head[: len(head) // 4 * 4])
    if len(offsets) != shard.num_samples + 2 or offsets[0] != shard.num_samples or offsets[-1] != shard.raw.size:
        raise ValueError(f"{raw}: its header must list {shard.num_samples} samples in {shard.raw.size} bytes")
    if any(begin >= end for begin, end in itertools.pairwise(offsets[1:])) or offsets[1] < len(head):
        raise ValueError(f"{raw}: its sample offsets must rise from {len(head)} to {shard.raw.size}")
    return offsets[1:]


def _drop_if_damaged(raw: Path, expected: FileRecord) -> None:
    """Delete an uncompressed copy that fails its check: the packed file, just verified, can make it again."""
    if not os.path.lexists(raw):
        return
    try:
        verify_file(raw, expected)
    except ValueError as error:
        logger.warning("%s; making it again from its packed file", error)
        raw.unlink()


def verify_file(path: Path, expected: FileRecord) -> None:
    """Check the size and the hashes of one file, once per (size, time, inode) in this process.

    Raises:
        ValueError: missing, no regular file, another size, or another hash.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing (or no regular file): the index promises {expected.size} bytes")
    status = path.stat()
    if status.st_size != expected.size:
        raise ValueError(f"{path} must have {expected.size} bytes, got {status.st_size}: truncated or overwritten")
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
    if _verified.get(path) == stamp:
        return
    digests = {algorithm: _HASHES[algorithm]() for algorithm, _ in expected.hashes}
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
    for algorithm, value in expected.hashes:
        got = digests[algorithm].hexdigest()
        if got != value:
            raise ValueError(f"{path} is damaged: {algorithm} must be {value}, got {got}; delete it or write it anew")
    _verified[path] = stamp


def read_packed(path: Path, shard: ShardRecord) -> bytes:
    """Decompress a verified zstd file that must hold exactly the promised number of bytes."""
    data = path.read_bytes()
    claimed = _zstd_content_size(data)
    if claimed != shard.raw.size:
        raise ValueError(f"{path} must unpack to {shard.raw.size} bytes, its header says {claimed}")
    try:
        return zstd.decompress(data)
    except zstd.Error as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error


def _zstd_content_size(data: bytes) -> int | None:
    """Read the content size from a zstd frame header (RFC 8878, section 3.1.1.1); None if it is not given."""
    if len(data) < 18 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = data[4]
    size_flag, single_segment, id_flag = descriptor >> 6, bool(descriptor & 0x20), descriptor & 3
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[id_flag]
    width = (1 if single_segment else 0, 2, 4, 8)[size_flag]
    value = int.from_bytes(data[start : start + width], "little")
    return None if width == 0 else value + (256 if width == 2 else 0)


@contextmanager
def lock_folder(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a lock of the folder; the kernel frees it when its holder dies.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): name a writable cache folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cache_folder(cache: Path, record: DatasetRecord) -> Path:
    """The subfolder of `cache` that belongs to exactly this index."""
    digest = hashlib.sha256((record.path / INDEX_FILE).read_bytes()).hexdigest()[:16]
    folder = cache.absolute() / f"shards-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_plain_index(record: DatasetRecord, target: Path) -> None:
    """Write the cache's index: the same shards, uncompressed."""
    index = _read_json(record.path / INDEX_FILE)
    for shard in index["shards"]:
        shard["compression"], shard["zip_data"] = None, None
    text = json.dumps(index, sort_keys=True).encode()
    if not (target / INDEX_FILE).is_file() or (target / INDEX_FILE).read_bytes() != text:
        write_whole(target / INDEX_FILE, text)
