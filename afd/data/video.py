"""Video files to float frames and back (PyAV). Owns resampling in time and space; knows no codec, prompt or shard.

Time resampling goes by the frames' own time stamps. The default blends the two neighbouring frames linearly: from
24 to 10 fps the nearest frame is up to 1/48 s away, and that jitter ruins speeds and accelerations read off the
result, while a blend keeps each object's centroid where it was (at the price of a slight motion blur). "nearest"
keeps every frame as sharp as it was filmed.
"""

import io
import itertools
import os
import secrets
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

# Containers of finished videos. Left out: playlists and scripts that make FFmpeg open other files or addresses.
_CONTAINERS = "mov,matroska,webm,gif,avi,mpegts,mpeg,flv,ogg,asf,ivf,yuv4mpegpipe"
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
# 8k is 7680 x 4320.
MAX_SIDE = 8192
UPSCALE = {"nearest": cv2.INTER_NEAREST, "bicubic": cv2.INTER_CUBIC}


def decode_video(
    mp4: bytes | str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    resample: Literal["linear", "nearest"] = "linear",
    name: str | None = None,
) -> np.ndarray:
    """Decode the first num_frames / fps seconds of a video at exactly the wanted rate and size.

    Output frame i shows time i / fps after the first frame. Each frame, turned as its container says, is cropped about
    its centre to the aspect ratio width / height, then area-averaged down (or linearly interpolated up).

    Args:
        mp4: the file's bytes, or its path; any container and codec FFmpeg reads.
        num_frames: frames to return; > 0.
        height, width: pixels of the result; > 0.
        fps: frames per second of the result; > 0.
        resample: "linear" blends the two frames around each wanted time, "nearest" takes the closer one.
        name: what to call the video in errors; by default its path.
    Returns:
        [F, H, W, 3] float32 RGB in [0, 1].
    Raises:
        ValueError: the input is missing, empty, no video, damaged, turned by other than a multiple of 90 degrees, or
            ends before the last wanted frame.
    """
    label = name or (str(mp4) if not isinstance(mp4, bytes) else "video in memory")
    if min(num_frames, height, width) < 1 or fps <= 0:
        raise ValueError(
            f"num_frames, height, width and fps must be > 0, got {num_frames}, {height}, {width} and {fps}"
        )
    if resample not in ("linear", "nearest"):
        raise ValueError(f"resample must be 'linear' or 'nearest', got {resample!r}")
    wanted = np.arange(num_frames) / fps
    frames = np.empty((num_frames, height, width, 3), dtype=np.float32)
    done, last_time, gap = 0, 0.0, 0.0
    before: np.ndarray | None = None
    for time_s, picture in _timed_pictures(mp4, label):
        after = _fit(picture, height, width)
        if before is None:
            before, last_time = after, time_s
        gap = time_s - last_time
        while done < num_frames and wanted[done] <= time_s:
            share = (wanted[done] - last_time) / gap if gap > 0 else 1.0
            share = round(share) if resample == "nearest" else share
            frames[done] = (1.0 - share) * before + share * after
            done += 1
        before, last_time = after, time_s
        if done == num_frames:
            return frames
    if before is None:
        raise ValueError(f"{label}: no frame could be decoded")
    # The last frame stays on screen for as long as the one before it did.
    end = last_time + gap
    while done < num_frames and wanted[done] < end - 1e-6:
        frames[done] = before
        done += 1
    if done < num_frames:
        raise ValueError(
            f"{label}: too short: {num_frames} frames at {fps:g} fps need more than {wanted[-1]:.3f} s, got {end:.3f} s"
        )
    return frames


def _timed_pictures(mp4: bytes | str | Path, label: str) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds after the first frame, [H, W, 3] uint8 RGB as shown), in order; times never fall."""
    if not isinstance(mp4, bytes):
        if not Path(mp4).is_file():
            raise ValueError(f"{label}: no such file")
        size = Path(mp4).stat().st_size
    else:
        size = len(mp4)
    if size == 0:
        raise ValueError(f"{label}: empty file (0 bytes)")
    try:
        with _open(mp4) as container:
            if not container.streams.video:
                kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
                raise ValueError(f"{label}: no video stream, it holds {', '.join(kinds)}")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"{label}: no decoder for its codec")
            stream.codec_context.options = {"err_detect": "explode"}  # an error, not a patched-up picture
            first = previous = None
            # One converter for all frames and no threads of its own: a frame's own would start several for each.
            converter = VideoReformatter()
            for frame in _bounded(container, stream, label):
                if frame.is_corrupt:
                    raise ValueError(f"{label}: a frame is damaged")
                if frame.pts is None or frame.time_base is None:
                    raise ValueError(f"{label}: a frame has no time stamp")
                time_s = float(frame.pts * frame.time_base)
                first = time_s if first is None else first
                if previous is not None and time_s < previous:
                    raise ValueError(f"{label}: time stamps run backwards, {previous:.3f} s then {time_s:.3f} s")
                previous = time_s
                picture = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                yield time_s - first, _as_shown(picture, frame, label)
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{label}: cannot be decoded as a video: {error.strerror or error}") from error


def _as_shown(picture: np.ndarray, frame: Any, label: str) -> np.ndarray:
    """Turn and mirror a coded [h, w, 3] picture as players do: phones write upright videos as sideways frames and a
    display matrix, x' = a x + c y and y' = b x + d y with y down (ISO/IEC 14496-12, 6.2.2).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = map(int, np.frombuffer(matrix, np.int32)[:5])
    straight, across = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, across) > 0.01 * max(straight, across):
        raise ValueError(f"{label}: must be shown turned by a multiple of 90 degrees, got {-frame.rotation} clockwise")
    if across > straight:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _open(mp4: bytes | str | Path) -> Any:
    # A caption in another encoding must not stop the decoding of pictures.
    source = io.BytesIO(mp4) if isinstance(mp4, bytes) else str(mp4)
    return av.open(source, mode="r", options=dict(_OPEN_OPTIONS), metadata_errors="replace")


def _bounded(container: Any, stream: Any, label: str) -> Iterator[Any]:
    """Decode a stream's frames; refuse sizes that no video has before memory is taken for them."""
    for frame in itertools.chain([stream], container.decode(stream)):
        if max(frame.width or 0, frame.height or 0) > MAX_SIDE:
            raise ValueError(
                f"{label}: frames must be at most {MAX_SIDE} pixels a side, got {frame.width}x{frame.height}"
            )
        if frame is not stream:
            yield frame


def duration_s(mp4: bytes | str | Path) -> float:
    """Length of a video as its container says, s; 0 when it does not say, or is no video."""
    try:
        with _open(mp4) as container:
            stream = container.streams.video[0] if container.streams.video else None
            if stream is not None and stream.duration and stream.time_base:
                return max(0.0, float(stream.duration * stream.time_base))
            return max(0.0, (container.duration or 0) / av.time_base)
    except (FFmpegError, OSError):
        return 0.0


def _fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre-crop [h, w, 3] uint8 to width / height and resize: [height, width, 3] float32 in [0, 1]."""
    h, w = picture.shape[:2]
    crop_h, crop_w = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cropped = picture[top : top + crop_h, left : left + crop_w].astype(np.float32) / 255.0
    if (crop_h, crop_w) == (height, width):
        return cropped
    shrinks = crop_h >= height and crop_w >= width
    return cv2.resize(cropped, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def encode_video(
    frames: np.ndarray,
    path: str | Path | None = None,
    *,
    fps: float,
    crf: int = 18,
    scale: int = 1,
    upscale: Literal["nearest", "bicubic"] = "nearest",
) -> bytes:
    """Encode frames as H.264 (yuv420p, one thread, index first) that browsers play; odd sizes gain an edge pixel.

    Args:
        frames: [F, H, W, 3] RGB, uint8, or floating in [0, 1] (clipped).
        path: also written there (whole or not at all) when given.
        fps: frames per second; > 0.
        crf: H.264 quality, 0 (lossless) to 51.
        scale: enlarges tiny videos for watching, by `upscale`.
    Returns:
        The mp4 file.
    Raises:
        ValueError: frames are not [F > 0, H, W, 3], not finite, or fps, crf, scale or upscale are out of range.
    """
    if fps <= 0 or not 0 <= crf <= 51:
        raise ValueError(f"expected fps > 0 and crf in [0, 51], got {fps} and {crf}")
    pictures = to_pictures(frames, scale=scale, upscale=upscale)
    data = _encode_h264(pictures, fps, crf)
    if path is not None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        temporary.write_bytes(data)
        os.replace(temporary, target)
    return data


def to_pictures(
    frames: np.ndarray, *, scale: int = 1, upscale: Literal["nearest", "bicubic"] = "nearest"
) -> np.ndarray:
    """Frames as an H.264 encoder takes them: [F, H, W, 3] uint8, enlarged, odd sides given an edge pixel more.

    Raises:
        ValueError: frames are not [F > 0, H, W, 3], not finite, or scale or upscale are out of range.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise ValueError(f"frames must be [F, H, W, 3] with F > 0, got {list(frames.shape)}")
    if scale < 1 or upscale not in UPSCALE:
        raise ValueError(f"expected scale >= 1 and upscale in {sorted(UPSCALE)}, got {scale} and {upscale!r}")
    pictures = _to_uint8(frames)
    if scale > 1:
        size = (frames.shape[2] * scale, frames.shape[1] * scale)
        pictures = np.stack([cv2.resize(picture, size, interpolation=UPSCALE[upscale]) for picture in pictures])
    odd = [(0, size % 2) for size in pictures.shape[1:3]]
    return np.pad(pictures, [(0, 0), *odd, (0, 0)], mode="edge")


def _to_uint8(frames: np.ndarray) -> np.ndarray:
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or floating, got {frames.dtype}")
    if not np.isfinite(frames).all():
        raise ValueError("frames must be finite, got NaN or infinity")
    return (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _encode_h264(pictures: np.ndarray, fps: float, crf: int) -> bytes:
    """Encode [F, H, W, 3] uint8 with even H and W."""
    # FFmpeg moves the index to the front by reopening the file by name, so it cannot work in memory.
    with tempfile.TemporaryDirectory(prefix="afd-encode-") as folder:
        path = Path(folder, "video.mp4")
        with av.open(str(path), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = pictures.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            # With its macroblock tree on, x264 encodes very small frames differently from one call to the next.
            stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()
