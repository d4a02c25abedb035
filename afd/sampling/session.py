"""One streaming session: encoders, stream, file and player put together. What `afd sample --stream` runs."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from afd.config import RunConfig, StudentShape
from afd.models.conditioning import ImageCondition
from afd.models.encoders import VideoCodec, encode_prompts, latent_shape, load_codec, load_text_encoder
from afd.models.image_encoder import condition_on, takes_images
from afd.models.student import CausalStudent
from afd.rollout import sampler_times
from afd.sampling.live import LivePrompt
from afd.sampling.mp4_stream import LiveVideoWriter
from afd.sampling.player import Player
from afd.sampling.stream import StreamedChunk, StreamStatistics, stream_chunks

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamRequest:
    """What to stream, and where to.

    Attributes:
        prompt: to begin with.
        then: (seconds of video, prompt) changes, in order; each counts from the first chunk that starts at or after.
        seconds: of video, rounded up to whole chunks; None goes on until interrupted or stopped from the page.
        out: mp4 file; None writes none.
        port: of the player; None serves none, 0 takes a free one.
        host: address the player listens on.
        ahead_s: seconds of video generated ahead of playback when there is a player.
        seed: of the noise.
        scale: enlargement of the file's frames.
        images: the first frame to go on from, and maybe the last; an image-to-video student needs `seconds` with them.
    """

    prompt: str
    then: tuple[tuple[float, str], ...] = ()
    seconds: float | None = None
    out: Path | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    ahead_s: float = 1.0
    seed: int = 0
    scale: int = 1
    images: tuple[Image.Image, ...] = ()


def streaming_shape(shape: StudentShape, *, trained_frames: int, window: int | None, sink: int | None) -> StudentShape:
    """The shape to stream with: the asked-for window and sink, else the student's own.

    A student that has no window has never attended further back than a training clip: it gets that length, less the
    sink if one is asked for.

    Args:
        shape: the student's.
        trained_frames: latent frames of a training clip.
        window, sink: frames, None where not asked for.
    Raises:
        ValueError: the window does not hold a chunk.
    """
    if window is None and shape.window_frames is None:
        window = max(trained_frames - (sink or 0), shape.first_chunk_frames or 0, shape.chunk_frames)
    changes: dict[str, Any] = {
        "window_frames": shape.window_frames if window is None else window,
        "sink_frames": shape.sink_frames if sink is None else sink,
    }
    return StudentShape(**shape.model_dump() | changes)


def num_chunks_of(
    seconds: float | None, *, fps: float, shape: StudentShape, pixel_frames: Callable[[int], int]
) -> int | None:
    """Chunks of at least `seconds` of video; None stays without end.

    Raises:
        ValueError: seconds are not positive and finite.
    """
    if seconds is None:
        return None
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be a finite number > 0, got {seconds}")
    chunks, latent_frames = 1, shape.first_chunk_frames or shape.chunk_frames
    while pixel_frames(latent_frames) < seconds * fps - 1e-6:
        chunks, latent_frames = chunks + 1, latent_frames + shape.chunk_frames
    return chunks


def run_stream(
    student: CausalStudent,
    config: RunConfig,
    request: StreamRequest,
    *,
    announce: Callable[[str], None] = _log.info,
) -> StreamStatistics:
    """Stream until the end, an interrupt, or the page's stop; the file is finished in every case.

    Args:
        student: bare module with the shape of `streaming_shape`; everything runs on its device.
        config: the run's: sampler, encoders, video format.
        request: see there.
        announce: told the player's address, and what happens.
    Returns:
        Latency and speed.
    Raises:
        ValueError: a prompt cannot be embedded, or something does not fit the student.
        OSError: the port is taken, or the file cannot be written.
    """
    if request.seconds is None and takes_images(student.shape):
        raise ValueError("--seconds must be given to stream an image-to-video student, which sees its image all along")
    device = next(student.parameters()).device
    codec = load_codec(config.encoders, device=device)
    prompt = LivePrompt(_prompt_encoder(config, request, device), request.prompt)
    num_chunks = num_chunks_of(
        request.seconds, fps=config.video.fps, shape=student.shape, pixel_frames=codec.num_pixel_frames
    )
    image, first_chunk = _given(request, student.shape, codec, config, num_chunks, device)
    chunks = stream_chunks(
        student,
        codec,
        prompt,
        sampler_times(config.rollout),
        latent_size=latent_shape(config.encoders, config.video)[2:],
        seed=request.seed,
        num_chunks=num_chunks,
        image=image,
        first_chunk=first_chunk,
    )
    statistics = StreamStatistics()
    with contextlib.ExitStack() as stack:
        player = writer = None
        if request.out is not None:
            writer = stack.enter_context(LiveVideoWriter(request.out, fps=config.video.fps, scale=request.scale))
        if request.port is not None:
            player = stack.enter_context(_player(config, request, student.shape, prompt))
            announce(f"streaming at {player.url} (waits for a viewer, pauses without one)")
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))  # the usual way to end a stream without an end
        if player is not None and not player.wait_for_viewer():
            return statistics
        pending = list(request.then)
        for chunk in chunks:
            assert chunk.frames is not None
            with _uninterrupted():
                statistics.add(chunk)
                if writer is not None:
                    writer.write(chunk.frames[0].numpy())
            if player is not None and not player.show(chunk, statistics):
                break
            _apply_changes(pending, prompt, chunk, fps=config.video.fps)
    return statistics


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block: what is counted is what is written. Only the main thread hears it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _given(
    request: StreamRequest,
    shape: StudentShape,
    codec: VideoCodec,
    config: RunConfig,
    num_chunks: int | None,
    device: torch.device,
) -> tuple[ImageCondition | None, Tensor | None]:
    """The images as the stream takes them; an image-to-video student's are spread over all its frames."""
    frames = (shape.first_chunk_frames or shape.chunk_frames) + ((num_chunks or 1) - 1) * shape.chunk_frames
    size = config.video.height, config.video.width
    return condition_on(
        request.images, shape, codec, config.encoders, size=size, num_latent_frames=frames, device=device
    )


def _player(config: RunConfig, request: StreamRequest, shape: StudentShape, prompt: LivePrompt) -> Player:
    assert request.port is not None
    video = config.video
    model = f"{shape.num_layers} blocks of {shape.dim}, {video.width} x {video.height}"
    title = f"{model}, sees {shape.sink_frames} + {shape.window_frames} frames"
    return Player(prompt, title=title, fps=video.fps, port=request.port, host=request.host, ahead_s=request.ahead_s)


def _prompt_encoder(config: RunConfig, request: StreamRequest, device: torch.device) -> Callable[[str], Tensor]:
    """Embeds one prompt. Without a player all prompts are known: they are embedded now and the encoder is freed."""
    if request.port is not None:
        text = load_text_encoder(config.encoders, device=device)
        return lambda prompt: text.encode([prompt])
    prompts = [request.prompt, *(prompt for _, prompt in request.then)]
    embeds = encode_prompts(config.encoders, prompts, device=device)
    return dict(zip(prompts, embeds.split(1), strict=True)).__getitem__


def _apply_changes(pending: list[tuple[float, str]], prompt: LivePrompt, chunk: StreamedChunk, *, fps: float) -> None:
    """Take every change that is due when the next chunk starts off the list."""
    next_start_s = (chunk.first_frame + chunk.num_frames) / fps
    while pending and pending[0][0] <= next_start_s + 1e-6:
        prompt.change(pending.pop(0)[1])
