"""Frames to a container: numbered pictures without loss, an array as H.264. Leaves out finding folders (folder.py)."""

from __future__ import annotations

import io
import re
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_FRAMES = 10_000
_MAX_SIDE = 8192


def list_frames(folder: Path) -> list[Path]:
    """The frames of a folder in the order of the numbers in their names (`f2.png` before `f10.png`)."""
    frames = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES and path.is_file()]
    return sorted(frames, key=lambda path: [int(part) if part.isdigit() else part for part in _parts(path.name)])


def _parts(name: str) -> list[str]:
    return re.split(r"([0-9]+)", name)


def encode_frame_folder(folder: Path, *, fps: float, max_bytes: int) -> bytes:
    """Pack a folder of equally large pictures as FFV1 in Matroska: every pixel survives.

    Raises:
        ValueError: no frames or too many, a frame that cannot be read, sizes that differ, or a result over max_bytes.
    """
    import av
    import cv2

    frames = list_frames(folder)
    if not 0 < len(frames) <= MAX_FRAMES or fps <= 0:
        raise ValueError(f"{folder.name}: needs 1 to {MAX_FRAMES} frames and fps > 0, got {len(frames)} and {fps}")
    with tempfile.TemporaryDirectory(prefix="afd-frames-") as temporary:
        path, size = Path(temporary, "frames.mkv"), None
        with av.open(str(path), mode="w", format="matroska") as container:
            stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
            for file in frames:
                picture = cv2.imdecode(np.frombuffer(file.read_bytes() or b"\0", np.uint8), cv2.IMREAD_COLOR)
                if picture is None or max(picture.shape) > _MAX_SIDE:
                    raise ValueError(f"{folder.name}/{file.name}: no picture of at most {_MAX_SIDE} pixels a side")
                if size is None:
                    size = picture.shape
                    stream.height, stream.width, stream.pix_fmt = size[0], size[1], "bgr0"
                if picture.shape != size:
                    raise ValueError(f"{folder.name}/{file.name}: frames must be {size}, got {picture.shape}")
                image = av.VideoFrame.from_ndarray(picture.astype(np.uint8, copy=False), format="bgr24")
                container.mux(stream.encode(image.reformat(format="bgr0")))
                if path.stat().st_size > max_bytes:
                    raise ValueError(f"{folder.name}: packed frames must be at most {max_bytes} bytes")
            container.mux(stream.encode())
        return path.read_bytes()


def encode_mp4(frames: np.ndarray, *, fps: int, crf: int) -> bytes:
    """Encode [T, H, W, 3] uint8 (even H and W) as an H.264 mp4 in memory; equal frames give equal bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        # With its macroblock tree on, x264 encodes such small frames differently from one call to the next.
        stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
