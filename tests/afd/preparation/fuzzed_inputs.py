"""Makes the folder of test_fuzz.py: 230 videos and captions, most of them wrong in one of many ways."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from afd.data.video import encode_video
from afd.teachers.physics import training_prompts

MakeFile = Callable[[Path], None]


def clip(number: int, *, num_frames: int = 13, height: int = 16, width: int = 16) -> bytes:
    """A video of its own for each number."""
    coarse = np.random.default_rng(number).random((num_frames, 4, 4, 3), dtype=np.float32)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return encode_video(coarse[:, rows][:, :, columns], fps=8)


def audio_only() -> bytes:
    """An mp4 with a tone and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(16):
            wave = np.sin(np.arange(1024) * 0.1 + i).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def timed(times_ms: list[int], *, height: int = 16, width: int = 16, seed: int = 0) -> bytes:
    """An mp4 whose frames are shown at the given times: a variable frame rate."""
    buffer = io.BytesIO()
    draw = np.random.default_rng(seed)
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for at in times_ms:
            picture = np.full((height, width, 3), draw.integers(0, 255, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def too_wide() -> bytes:
    """A picture wider than any video."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16384, "yuvj420p"
        for _ in range(13):
            picture = np.zeros((16, 16384, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def damaged(kind: str, draw: random.Random, number: int) -> bytes:
    """The bytes of one wrong (or unusual) file."""
    data = bytearray(clip(number))
    if kind == "cut":
        return bytes(data[: draw.randrange(1, len(data))])
    if kind == "flips":
        for _ in range(draw.randrange(1, 30)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    if kind == "hole":
        begin = draw.randrange(len(data))
        data[begin : begin + 200] = bytes(min(200, len(data) - begin))
        return bytes(data)
    if kind == "text":
        return draw.choice([b"no video\n" * 50, b"[{}]", b"<html>", b"\x00" * 999, "größer".encode("latin-1") * 9])
    if kind == "playlist":
        return draw.choice(
            [
                b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
                b"ffconcat version 1.0\nfile '/etc/hostname'\n",
                b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n",
            ]
        )
    if kind == "short":
        return clip(number, num_frames=draw.randrange(1, 6))
    if kind == "odd":
        return clip(number, height=draw.randrange(3, 70), width=draw.randrange(3, 70))
    if kind == "variable":
        times = sorted(draw.sample(range(1, 2600), 22))
        return timed([0, *times, 2700], seed=number)
    return {"empty": b"", "good": bytes(data), "audio": audio_only(), "wide": too_wide()}.get(kind) or (
        b"" if kind == "empty" else timed([0, 1000, 2000], height=4320, width=7680)
    )


COUNTS = {
    "good": 12,
    "empty": 6,
    "cut": 45,
    "flips": 55,
    "hole": 15,
    "text": 12,
    "playlist": 9,
    "short": 12,
    "odd": 14,
    "variable": 10,
    "audio": 2,
    "wide": 2,
    "8k": 1,
}


def make_folder(folder: Path, outside: Path) -> Iterator[tuple[str, str]]:
    """Write the folder; yields (name of the file or row, kind) of every input."""
    folder.mkdir()
    draw, prompts = random.Random(7), iter(training_prompts(400))
    lines: list[bytes] = []
    number = 0
    for kind, count in COUNTS.items():
        for _ in range(count):
            name = f"{number:03}-{kind}.mp4"
            (folder / name).write_bytes(damaged(kind, draw, number))
            lines.append(json.dumps({"file_name": name, "caption": next(prompts)}).encode())
            number += 1
            yield name, kind
    (outside / "secret.mp4").write_bytes(clip(900))
    (folder / "loop-a.mp4").symlink_to(folder / "loop-b.mp4")
    (folder / "loop-b.mp4").symlink_to(folder / "loop-a.mp4")
    (folder / "out.mp4").symlink_to(outside / "secret.mp4")
    (folder / "self").symlink_to(folder, target_is_directory=True)
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    files = ["loop-a.mp4", "loop-b.mp4", "out.mp4", "folder.mp4", "pipe.mp4"]
    files += ["absent.mp4", "../" + outside.name + "/secret.mp4", str(outside / "secret.mp4"), "self/self/out.mp4", "."]
    for name in files:
        lines.append(json.dumps({"file_name": name, "caption": next(prompts)}).encode())
        yield name, "path"
    for i, caption in enumerate(["", "   ", None, 7, {"b": 1}, "x" * 100_000, "a\x00b", "no such word", "\ud800"]):
        (folder / f"caption-{i}.mp4").write_bytes(clip(700 + i))
        lines.append(json.dumps({"file_name": f"caption-{i}.mp4", "caption": caption}).encode())
        yield f"caption-{i}.mp4", "caption"
    for i, line in enumerate([b"\xff\xfe broken", b"{", b"[]", b"null", b'{"file_name": "x"', b"\xc3\x28", b'"text"']):
        lines.append(line)
        yield f"line {i}", "line"
    for i in range(5):
        (folder / f"nocaption-{i}.mp4").write_bytes(clip(800 + i))
        yield f"nocaption-{i}.mp4", "no caption"
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
