"""The layout of one MDS shard, written without `streaming`: a row's bytes, a shard's bytes, its entry in index.json.

Byte for byte what `streaming.MDSWriter` writes (a test compares them), but every step is the caller's: preparation
keeps rows on the disk before their shard is full, and writes each file whole or not at all.
Source: mosaicml-streaming 0.13, `streaming/base/format/mds/writer.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstd

from afd.data.schema import BF16, COLUMNS, decode_bf16, encode_bf16

INDEX_FILE = "index.json"
HASHES = ["sha1", "xxh3_64"]  # streaming wants them sorted
COMPRESSION_LEVEL = 3
COMPRESSION = f"zstd:{COMPRESSION_LEVEL}"
FIXED_SIZES = {"int": 8, "float64": 8}
MAX_SHARD_BYTES = (1 << 32) - 1  # offsets inside a shard are uint32


def encode_row(row: Mapping[str, Any]) -> bytes:
    """Lay a row of `schema.to_row` out: the sizes of its variable columns (u32), then all columns by name.

    Raises:
        ValueError: text that cannot be UTF-8, or a seed beyond 64 bits.
    """
    sizes, data = [], []
    for name in sorted(COLUMNS):
        datum = _encode(COLUMNS[name], row[name])
        if COLUMNS[name] not in FIXED_SIZES:
            sizes.append(len(datum))
        data.append(datum)
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(data)


def _encode(encoding: str, value: Any) -> bytes:
    if encoding == "str":
        return value.encode("utf-8")
    if encoding == BF16:
        return encode_bf16(value)
    if encoding == "int":
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"an integer column holds 64 bits, got {value}")
        return struct.pack("<q", value)
    if encoding == "float64":
        return struct.pack("<d", value)
    return bytes(value)


def decode_row(data: bytes) -> dict[str, Any]:
    """Undo `encode_row`.

    Raises:
        ValueError: the bytes do not add up, or a column is not of its kind.
    """
    names = sorted(COLUMNS)
    variable = [name for name in names if COLUMNS[name] not in FIXED_SIZES]
    if len(data) < 4 * len(variable):
        raise ValueError(f"a row must have at least {4 * len(variable)} bytes, got {len(data)}")
    sizes = dict(zip(variable, struct.unpack_from(f"<{len(variable)}I", data), strict=True))
    row, at = {}, 4 * len(variable)
    for name in names:
        size = sizes.get(name, 8)
        row[name] = _decode(COLUMNS[name], data[at : at + size])
        at += size
    if at != len(data):
        raise ValueError(f"a row's columns must fill its {len(data)} bytes, got {at}")
    return row


def _decode(encoding: str, data: bytes) -> Any:
    if encoding == "str":
        return data.decode("utf-8")
    if encoding == BF16:
        return decode_bf16(data)
    if encoding in FIXED_SIZES:
        if len(data) != FIXED_SIZES[encoding]:
            raise ValueError(f"a number has {FIXED_SIZES[encoding]} bytes, got {len(data)}")
        return struct.unpack("<q" if encoding == "int" else "<d", data)[0]
    return data


def shard_config(shard_bytes: int) -> dict[str, Any]:
    """What a shard says about itself, in its header and in index.json."""
    names = sorted(COLUMNS)
    return {
        "version": 2,
        "format": "mds",
        "compression": COMPRESSION,
        "hashes": HASHES,
        "size_limit": shard_bytes,
        "column_names": names,
        "column_encodings": [COLUMNS[name] for name in names],
        "column_sizes": [FIXED_SIZES.get(COLUMNS[name]) for name in names],
    }


def encode_shard(rows: Sequence[bytes], config: Mapping[str, Any]) -> bytes:
    """Lay rows out as one uncompressed shard: count, offsets (u32), the configuration as JSON, the rows."""
    described = json.dumps(config, sort_keys=True).encode()
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64) + 4 + 4 * (len(rows) + 1) + len(described)
    return struct.pack("<I", len(rows)) + offsets.astype("<u4").tobytes() + described + b"".join(rows)


class ShardBuilder:
    """Rows in, numbered and compressed shard files out; a shard is closed before the row that would overfill it.

    Args:
        folder: where the shards go.
        shard_bytes: size of an uncompressed shard; a single larger row gets a shard of its own.
        entries: index entries of the shards that are already there.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, entries: Sequence[dict[str, Any]] = ()) -> None:
        if not 0 < shard_bytes <= MAX_SHARD_BYTES:
            raise ValueError(f"shard_bytes must be in [1, {MAX_SHARD_BYTES}], got {shard_bytes}")
        self.folder, self.entries = folder, list(entries)
        self._config = shard_config(shard_bytes)
        self._rows: list[bytes] = []
        self._base = 8 + len(json.dumps(self._config, sort_keys=True).encode())
        self._limit, self._size = shard_bytes, self._base

    def add(self, row: bytes) -> dict[str, Any] | None:
        """Take a row of `encode_row`; returns the entry of the shard it closed, if any.

        Raises:
            ValueError: the row alone is larger than a shard can be.
        """
        if len(row) + self._base + 4 > MAX_SHARD_BYTES:
            raise ValueError(f"a row must be smaller than {MAX_SHARD_BYTES} bytes, got {len(row)}")
        closed = self.close() if self._size + len(row) + 4 > self._limit else None
        self._rows.append(row)
        self._size += len(row) + 4
        return closed

    @property
    def is_starting(self) -> bool:
        """True when the open shard has no row yet."""
        return not self._rows

    def close(self) -> dict[str, Any] | None:
        """Write the open shard, whole or not at all, and return its entry; None when it has no row."""
        if not self._rows:
            return None
        name = f"shard.{len(self.entries):05}.mds"
        raw = encode_shard(self._rows, self._config)
        packed = zstd.compress(raw, COMPRESSION_LEVEL)
        write_whole(self.folder / f"{name}.zstd", packed)
        entry = {
            "samples": len(self._rows),
            "raw_data": _describe(raw, name),
            "zip_data": _describe(packed, f"{name}.zstd"),
            **self._config,
        }
        self.entries.append(entry)
        self._rows, self._size = [], self._base
        return entry

    def write_index(self) -> None:
        """Write index.json; the open shard must be closed."""
        assert not self._rows
        write_whole(
            self.folder / INDEX_FILE, json.dumps({"version": 2, "shards": self.entries}, sort_keys=True).encode()
        )


def _describe(data: bytes, name: str) -> dict[str, Any]:
    hashes = {"sha1": hashlib.sha1(data).hexdigest(), "xxh3_64": xxhash.xxh3_64(data).hexdigest()}
    return {"basename": name, "bytes": len(data), "hashes": hashes}


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and is on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_unfinished(folder: Path) -> None:
    """Remove what `write_whole` leaves in a folder when its process is killed."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}", path.name):
            path.unlink()
