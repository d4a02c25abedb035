"""One finished video to the frames a student trains on, with what is measured on the way. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from afd.data.video import decode_video, duration_s, encode_video
from afd.teachers.base import SourceVideo

# ITU-R BT.601 weights of R, G, B in the luma.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class ClipFormat:
    """The frames a student trains on: `num_frames` pictures of height x width at fps, and what is kept as a file."""

    num_frames: int
    height: int
    width: int
    fps: float
    max_bytes: int = 1 << 30
    keep: str = "none"
    crf: int = 18


@dataclass(frozen=True)
class Clip:
    """A decoded video.

    Attributes:
        frames: [F, H, W, 3] float32 RGB in [0, 1].
        sha256: of the finished file.
        mp4: the file kept beside the latents; empty for none.
        duration_s: of the finished video, 0 when unknown.
        motion: mean absolute difference of neighbouring frames.
        brightness: mean luma.
    """

    frames: np.ndarray
    sha256: str
    mp4: bytes
    duration_s: float
    motion: float
    brightness: float


def decode_clip(video: SourceVideo, wanted: ClipFormat) -> Clip | str:
    """Read, decode and measure one video; a string is the reason why it cannot be used."""
    try:
        data = video.read(max_bytes=wanted.max_bytes)
        frames = decode_video(
            data,
            num_frames=wanted.num_frames,
            height=wanted.height,
            width=wanted.width,
            fps=wanted.fps,
            name=video.source_id,
        )
    except ValueError as error:
        return str(error).removeprefix(f"{video.source_id}: ")
    except MemoryError:
        return "needs more memory than this process may use"
    kept = {"source": data}.get(wanted.keep, b"")
    if wanted.keep == "resampled":
        kept = encode_video(frames, fps=wanted.fps, crf=wanted.crf)
    return Clip(
        frames=frames,
        sha256=hashlib.sha256(data).hexdigest(),
        mp4=kept,
        duration_s=duration_s(data),
        motion=float(np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(frames)] or [0.0])),
        brightness=float(np.mean([frame.mean((0, 1)) @ _LUMA for frame in frames])),
    )
