"""What one shard row holds, how bf16 lies in it, and the one door to `streaming`. Knows no file layout."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import math
import struct
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEMA_VERSION = 3
BF16 = "ndarray:uint16"  # MDS has no bfloat16: the bits, in an encoding that plain `streaming` reads
COLUMNS = {
    "prompt": "str",
    "latents": BF16,  # [C, F, H, W]
    "prompt_embeds": BF16,  # [L, D]
    "video_mp4": "bytes",  # empty unless the finished video is kept for pixel discriminators
    "source_id": "str",
    "sha256": "str",  # of the finished video, or of the latents' bits where there is none
    "teacher": "str",
    "teacher_version": "str",
    "licence": "str",  # tag, empty when unknown
    "short_prompt": "str",  # the original of an extended prompt, else empty
    "seed": "int",
    "fps": "float64",  # of the frames behind the latents
    "duration_s": "float64",  # of the finished video; 0 when unknown
    "motion": "float64",  # mean |difference| of neighbouring frames behind the latents, in [0, 1]
    "brightness": "float64",  # mean luma of these frames, in [0, 1]
    "schema_version": "int",
}
_MAX_DIMS = 8
_SIZE_CODES = "BHIQ"


@dataclass(frozen=True)
class Sample:
    """One prompt with its finished teacher video, encoded.

    Attributes:
        latents: [C, F, H, W] bfloat16 (floating input is rounded to it when written).
        prompt_embeds: [L, D], the same.
        video_mp4: the finished video, or None where only latents are kept.
        source_id: a name unique to (teacher, its settings, prompt, seed).
        sha256: filled in when empty.
        teacher_version: changes whenever the teacher's settings do.
        licence: tag, e.g. `CC-BY-4.0`; empty when unknown.
        short_prompt: the original of an extended prompt, else empty.
        duration_s: length of the finished video, s; 0 when unknown.
        motion: mean absolute difference of neighbouring frames behind the latents, in [0, 1].
        brightness: mean luma of these frames, in [0, 1].
    """

    prompt: str
    latents: Tensor
    prompt_embeds: Tensor
    video_mp4: bytes | None
    source_id: str
    teacher: str
    seed: int
    fps: float
    sha256: str = ""
    teacher_version: str = ""
    licence: str = ""
    short_prompt: str = ""
    duration_s: float = 0.0
    motion: float = 0.0
    brightness: float = 0.0


@dataclass(frozen=True)
class Reject:
    """A video that did not become a sample, why, and the file it was, where there is one; not final if the teacher may
    give it the next time."""

    source_id: str
    reason: str
    file: str = ""
    is_final: bool = True


def to_row(sample: Sample) -> dict[str, Any]:
    """Check a sample and lay it out by `COLUMNS`.

    Raises:
        ValueError: an empty prompt or source_id, text that is no UTF-8, a wrong rank, or a value that is not finite (in
            bfloat16, for tensors).
    """
    for name in ("prompt", "source_id"):
        if not getattr(sample, name):
            raise ValueError(f"{name} must not be empty (sample {sample.source_id!r})")
    for name in ("fps", "duration_s", "motion", "brightness"):
        if not 0 <= getattr(sample, name) < math.inf:
            raise ValueError(
                f"{name} must be finite and >= 0, got {getattr(sample, name)} (sample {sample.source_id!r})"
            )
    tensors = {}
    for name, axes in (("latents", "[C, F, H, W]"), ("prompt_embeds", "[L, D]")):
        tensor: Tensor = getattr(sample, name)
        if tensor.ndim != axes.count(",") + 1 or tensor.numel() == 0 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating {axes}, got {tensor.dtype} {list(tensor.shape)} (sample {sample.source_id!r})"
            )
        tensors[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} must be finite in bfloat16, got NaN or infinity (sample {sample.source_id!r})")
    video = sample.video_mp4 or b""
    digest = hashlib.sha256(video or encode_bf16(tensors["latents"])).hexdigest()
    return {
        **tensors,
        "prompt": sample.prompt,
        "video_mp4": video,
        "source_id": sample.source_id,
        "sha256": sample.sha256 or digest,
        **{name: getattr(sample, name) for name in ("teacher", "teacher_version", "licence", "short_prompt")},
        "seed": int(sample.seed),
        **{name: float(getattr(sample, name)) for name in ("fps", "duration_s", "motion", "brightness")},
        "schema_version": SCHEMA_VERSION,
    }


def from_row(row: Mapping[str, Any]) -> Sample:
    """Rebuild the sample of a decoded row; its tensors may be given as bits, as `streaming` gives them.

    Raises:
        ValueError: a column is missing or the row follows another schema version.
    """
    missing = sorted(set(COLUMNS) - set(row))
    if missing:
        raise ValueError(f"row lacks the columns {', '.join(missing)}")
    if row["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {row['schema_version']}")
    return Sample(
        prompt=row["prompt"],
        **{
            name: bf16_of_bits(row[name]) if isinstance(row[name], np.ndarray) else row[name]
            for name in ("latents", "prompt_embeds")
        },
        video_mp4=row["video_mp4"] or None,
        source_id=row["source_id"],
        teacher=row["teacher"],
        seed=int(row["seed"]),
        fps=float(row["fps"]),
        sha256=row["sha256"],
        teacher_version=row["teacher_version"],
        licence=row["licence"],
        short_prompt=row["short_prompt"],
        duration_s=float(row["duration_s"]),
        motion=float(row["motion"]),
        brightness=float(row["brightness"]),
    )


def encode_bf16(tensor: Tensor) -> bytes:
    """Lay a bfloat16 tensor's bits out as MDS's `ndarray:uint16`: number of axes and width of a size (u8), each size,
    the bits (u16), all little-endian.

    Raises:
        ValueError: not bfloat16, no element, no axis, or more than 8 of them.
    """
    if tensor.dtype != torch.bfloat16 or not 1 <= tensor.ndim <= _MAX_DIMS or tensor.numel() == 0:
        raise ValueError(
            f"tensor must be bfloat16 with 1 to {_MAX_DIMS} axes and not empty, got {tensor.dtype} {list(tensor.shape)}"
        )
    width = next(i for i, code in enumerate(_SIZE_CODES) if max(tensor.shape) < 1 << 8 * struct.calcsize(code))
    bits = tensor.detach().cpu().contiguous().view(torch.int16).numpy()
    sizes = struct.pack(f"<{tensor.ndim}{_SIZE_CODES[width]}", *tensor.shape)
    return bytes([tensor.ndim << 2 | width]) + sizes + bits.astype("<i2", copy=False).tobytes()


def decode_bf16(data: bytes) -> Tensor:
    """Undo `encode_bf16`, bit for bit.

    Raises:
        ValueError: the length does not fit the header.
    """
    num_dims, code = (data[0] >> 2, _SIZE_CODES[data[0] & 3]) if data else (0, "B")
    header = 1 + num_dims * struct.calcsize(code)
    if not 1 <= num_dims <= _MAX_DIMS or len(data) < header:
        raise ValueError(f"bf16 column has a broken header ({len(data)} bytes, {num_dims} axes)")
    shape = struct.unpack_from(f"<{num_dims}{code}", data, 1)
    expected = header + 2 * math.prod(shape)
    if len(data) != expected or expected == header:
        raise ValueError(f"bf16 column of shape {list(shape)} must have {expected} bytes, got {len(data)}")
    return bf16_of_bits(np.frombuffer(data, "<u2", offset=header).reshape(shape))


def bf16_of_bits(bits: np.ndarray) -> Tensor:
    """The bfloat16 tensor of the same shape with these bits (uint16), as `streaming` gives them; a copy."""
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Name the settings that made a data set: sha256 over their canonical JSON and the schema version.

    Raises:
        ValueError: the settings are not JSON (NaN included).
    """
    try:
        text = json.dumps({"schema_version": SCHEMA_VERSION, "settings": settings}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings must be plain JSON values: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def load_streaming() -> types.ModuleType:
    """Import `streaming`, mended.

    `streaming` imports torchvision for its vision data sets, which we do not use: where torchvision is absent (or
    broken by a torch it was not built for) an empty module takes their place.
    """
    if "streaming" not in sys.modules and not _has_torchvision():
        sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    import streaming
    from streaming.base.shared import prefix

    prefix._check_and_find = _closing_its_probes(prefix)
    return streaming


def _closing_its_probes(prefix: Any) -> Callable[..., int]:
    """`streaming`'s search for a free shared-memory name, without its leak.

    It opens every name in use, by whichever process, and closes none before the process ends: the n-th dataset of a
    process takes about 6 n file descriptors, and a long test run or notebook ends with "Too many open files".
    """
    find, shared_memory = prefix._check_and_find, prefix.SharedMemory

    @functools.wraps(find)
    def find_and_close(*arguments: Any, **keywords: Any) -> int:
        probes: list[Any] = []

        def attach(*names: Any) -> Any:
            probes.append(shared_memory(*names, auto_cleanup=False))
            return probes[-1]

        prefix.SharedMemory = attach
        try:
            return find(*arguments, **keywords)
        finally:
            prefix.SharedMemory = shared_memory
            for probe in probes:
                probe.cleanup()

    return find_and_close


def _has_torchvision() -> bool:
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # built for another torch: "operator torchvision::nms does not exist"
        return False
    return True
