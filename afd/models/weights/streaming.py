"""Writing safetensors one tensor at a time, for models larger than memory.

The format: 8 bytes of little-endian header length, a JSON header with dtype, shape and offsets of every tensor, then
the tensors' bytes one after the other. Source: huggingface/safetensors README.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from afd.models.weights.sources import DTYPES, LazyTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_tensors(
    tensors: Mapping[str, LazyTensor],
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write tensors in their order, each read, cast, written and dropped before the next; atomic.

    Args:
        tensors: by name.
        path: the file; written under another name first.
        dtype: of floating-point tensors; None keeps each one's.
        metadata: strings for the header.
    Returns:
        Bytes of the tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in tensors.items():
        kept = _written_dtype(tensor, dtype)
        size = torch.Size(tensor.shape).numel() * kept.itemsize
        header[name] = {
            "dtype": _NAMES[kept],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            value = tensor.read().detach().to("cpu", _written_dtype(tensor, dtype)).contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            del value
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return offset


def _written_dtype(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def split_shards(
    tensors: Mapping[str, LazyTensor], max_bytes: int, *, dtype: torch.dtype | None
) -> list[dict[str, LazyTensor]]:
    """Tensors in their order, in groups of at most max_bytes (one tensor at least)."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        size = torch.Size(tensor.shape).numel() * _written_dtype(tensor, dtype).itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= size
    return shards
