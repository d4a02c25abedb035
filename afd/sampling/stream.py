"""A stream: chunks that are decoded and handed over as soon as they are generated, without an end if so wished.

Owns the loop around `RolloutSampler` and a codec's causal decoder, and its timing. Who watches is `player`'s, files are
`mp4_stream`'s.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.distributed import seeded_generator
from afd.models.conditioning import ImageCondition
from afd.models.encoders import VideoCodec
from afd.models.student import CausalStudent
from afd.rollout import RolloutSampler, SamplerTimes

_STREAM_NOISE = 211  # keeps a stream's noise apart from rollouts of the same seed


@dataclass(frozen=True)
class StreamedChunk:
    """One chunk of a stream.

    Attributes:
        index: of the chunk, from 0.
        first_frame: index of its first video frame (of its first latent frame without a codec).
        num_frames: video frames (latent frames without a codec).
        latents: [N, C, K, H, W] on the student's device.
        frames: [N, num_frames, height, width, 3] float32 in [0, 1] on the CPU; None without a codec.
        prompt_version: how often the prompt had changed when the chunk was generated.
        generate_s: time to generate the latents, s: denoising, writing the chunk before it as context, and, where the
            prompt is new, its keys and values.
        decode_s: time to decode them and bring the frames to the CPU, s.
        elapsed_s: time since the stream was started until the chunk was ready, s; includes what the caller did.
    """

    index: int
    first_frame: int
    num_frames: int
    latents: Tensor
    frames: Tensor | None
    prompt_version: int
    generate_s: float
    decode_s: float
    elapsed_s: float


@dataclass
class StreamStatistics:
    """First-chunk latency and steady speed of a stream, with and without decoding.

    Steady means all chunks but the first, which also allocates and warms up. Time the caller spent between chunks
    (encoding files, waiting for viewers) counts in neither.

    Attributes:
        first_chunk_s: from the start of the stream to the first chunk's frames, s; None before.
        num_frames: frames of all chunks.
        peak_chunk_s: the slowest steady chunk, s.
    """

    first_chunk_s: float | None = None
    num_frames: int = 0
    peak_chunk_s: float = 0.0
    _frames: int = field(default=0, repr=False)
    _generate_s: float = field(default=0.0, repr=False)
    _decode_s: float = field(default=0.0, repr=False)

    def add(self, chunk: StreamedChunk) -> None:
        """Count one chunk."""
        self.num_frames += chunk.num_frames
        if self.first_chunk_s is None:
            self.first_chunk_s = chunk.generate_s + chunk.decode_s
            return
        self._frames += chunk.num_frames
        self._generate_s += chunk.generate_s
        self._decode_s += chunk.decode_s
        self.peak_chunk_s = max(self.peak_chunk_s, chunk.generate_s + chunk.decode_s)

    @property
    def fps(self) -> float | None:
        """Steady frames per second, generated and decoded; None before the second chunk."""
        return self._frames / (self._generate_s + self._decode_s) if self._frames else None

    @property
    def fps_without_decoding(self) -> float | None:
        """Steady frames per second of the student alone; None before the second chunk."""
        return self._frames / self._generate_s if self._frames else None


def stream_chunks(
    student: CausalStudent,
    codec: VideoCodec | None,
    prompt_embeds: Tensor | Callable[[], Tensor],
    times: SamplerTimes,
    *,
    latent_size: tuple[int, int],
    seed: int,
    num_chunks: int | None = None,
    image: ImageCondition | None = None,
    first_chunk: Tensor | None = None,
) -> Iterator[StreamedChunk]:
    """Generate, decode and yield chunk after chunk.

    Chunks are made when they are asked for: the consumer sets the pace. Nothing of a chunk is kept but what the KV
    cache and the decoder need of it, so memory is bounded whenever the student has a window. Equal to
    `rollout` and `codec.decode` of the whole video given the same noise (`stream_noise`).

    Args:
        student: the bare module; its shape says chunk, window and sink.
        codec: decodes; None yields latents alone.
        prompt_embeds: [N, L, D] on the student's device, or a function that is asked before every chunk. When it
            returns another tensor than before, the cross-attention's keys and values are computed anew; the
            self-attention's cache stays, so that the video goes on from where it is.
        times: when to denoise.
        latent_size: (H, W).
        seed: chunk i's noise depends on (seed, i) alone.
        num_chunks: how many; None for no end, which needs the student's window.
        image: what an image-to-video student sees of its image, for every frame of the stream.
        first_chunk: clean latents [N, C, K, H, W] to begin with instead of generating them.
    Yields:
        chunks, the first one as early as possible.
    Raises:
        ValueError: the prompts do not fit the student, or neither an end nor a window bounds the memory.
    """
    ask = prompt_embeds if callable(prompt_embeds) else lambda: prompt_embeds
    started = before = time.perf_counter()
    embeds = ask()
    shape = student.shape
    num_frames = (
        None
        if num_chunks is None
        else (shape.first_chunk_frames or shape.chunk_frames) + (num_chunks - 1) * shape.chunk_frames
    )
    sampler = RolloutSampler(student, embeds, times, latent_size=latent_size, num_frames=num_frames, image=image)
    decoder = None if codec is None else codec.new_decoder()
    first_frame, prompt_version = 0, 0
    for index in itertools.count() if num_chunks is None else range(num_chunks):
        if index:
            before = time.perf_counter()
            asked = ask()
            if asked is not embeds:
                embeds = asked
                sampler.set_prompt(embeds)
                prompt_version += 1
        size = (shape.out_channels, sampler.next_chunk_frames, *latent_size)
        noise = stream_noise(seed, index, len(embeds), times.num_noises, size).to(embeds.device)
        if first_chunk is not None and not index:
            sampler.give_chunk(first_chunk, noise[:, -1])
            latents = first_chunk
        else:
            latents = sampler.next_chunk(noise)
        _wait_for(latents.device)
        generated = time.perf_counter()
        frames = None if decoder is None else decoder.decode(latents).cpu()
        ready = time.perf_counter()
        made = latents.shape[2] if frames is None else frames.shape[1]
        yield StreamedChunk(
            index=index,
            first_frame=first_frame,
            num_frames=made,
            latents=latents,
            frames=frames,
            prompt_version=prompt_version,
            generate_s=generated - before,
            decode_s=0.0 if frames is None else ready - generated,
            elapsed_s=ready - started,
        )
        first_frame += made


def stream_noise(seed: int, index: int, batch: int, num_noises: int, chunk_shape: tuple[int, int, int, int]) -> Tensor:
    """Noise of one chunk: [N, S, C, K, H, W] float32 on the CPU, a function of (seed, chunk index, row) alone."""
    rows = [
        torch.randn((num_noises, *chunk_shape), generator=seeded_generator(_STREAM_NOISE, seed, index, row))
        for row in range(batch)
    ]
    return torch.stack(rows)


def _wait_for(device: torch.device) -> None:
    """Let a GPU finish, so that clocks read what was computed; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
