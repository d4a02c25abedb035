"""Chunk-by-chunk generation with a KV cache: the student's sampler, used in training and afterwards alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.config import RolloutSection, StudentShape
from afd.diffusion.flow_matching import add_noise, sampler_grid, x0_from_velocity
from afd.distributed import seeded_generator
from afd.models.conditioning import ImageCondition
from afd.models.student import CausalStudent
from afd_kernels import layout


@dataclass(frozen=True)
class SamplerTimes:
    """When a chunk is denoised.

    Attributes:
        times: S times in (0, 1], decreasing, of every chunk.
        first_chunk_times: the first chunk's own times where they differ.
        context_noise: time in [0, 1) to which a finished chunk is noised before its keys and values are cached.
    """

    times: tuple[float, ...]
    first_chunk_times: tuple[float, ...] | None = None
    context_noise: float = 0.0

    @property
    def num_noises(self) -> int:
        """Noise tensors a chunk needs at most: one per step, and one to become context unless that is noiseless."""
        return max(len(self.times), len(self.first_chunk_times or ())) + (self.context_noise > 0)

    def of_chunk(self, index: int) -> tuple[float, ...]:
        """Times of one chunk."""
        return self.first_chunk_times if index == 0 and self.first_chunk_times else self.times

    def describe(self) -> str:
        """The times in words."""
        text = ", ".join(f"{t:.4f}" for t in self.times)
        if self.first_chunk_times:
            text += "; first chunk " + ", ".join(f"{t:.4f}" for t in self.first_chunk_times)
        return text + (f"; context at {self.context_noise:.4f}" if self.context_noise else "")


def sampler_times(section: RolloutSection) -> SamplerTimes:
    """The configured times.

    Raises:
        ValueError: steps are empty, not strictly decreasing, or outside (0, 1000].
    """
    first = section.first_chunk_steps
    return SamplerTimes(
        times=sampler_grid(section.steps, shift=section.shift),
        first_chunk_times=None if first is None else sampler_grid(first, shift=section.shift),
        context_noise=section.context_noise,
    )


def rollout_noise(keys: Sequence[Sequence[int]], num_noises: int, latents_shape: Sequence[int]) -> Tensor:
    """All the noise of N rollouts, each row from its own seed, so that it does not depend on ranks or batching.

    Args:
        keys: N tuples of integers, e.g. (seed, step, sample id, rollout index).
        num_noises: S, `SamplerTimes.num_noises`.
        latents_shape: (C, F, H, W).
    Returns:
        [N, S, C, F, H, W] float32 on the CPU.
    """
    rows = [torch.randn((num_noises, *latents_shape), generator=seeded_generator(*key)) for key in keys]
    return torch.stack(rows)


def last_step_noise(noise: Tensor, times: SamplerTimes, shape: StudentShape) -> Tensor:
    """The noise that each chunk's last denoising step started from: [N, S, C, F, H, W] -> [N, C, F, H, W]."""
    spans = chunk_spans(shape, noise.shape[3])
    steps = (len(times.of_chunk(index)) for index in range(len(spans)))
    parts = [noise[:, count - 1, :, start:end] for count, (start, end) in zip(steps, spans, strict=True)]
    return torch.cat(parts, dim=2)


class RolloutSampler:
    """Generates N videos chunk by chunk: predict x0 at each time, re-noise it with fresh noise to the next.

    A deterministic function of the noise. Before the next chunk starts, the finished one is run once more at the
    context's time (0 unless `context_noise`) to write its keys and values: what the teacher-forcing training forward
    sees as context. The prompt's keys and values are computed once. With a window the memory is bounded and
    generation may go on without end; positions keep counting, so every query sees its true distance to what is kept.
    Source: Self-Forcing pipeline/causal_inference.py (the procedure).
    """

    @torch.no_grad()
    def __init__(
        self,
        student: CausalStudent,
        prompt_embeds: Tensor,
        times: SamplerTimes,
        *,
        latent_size: tuple[int, int],
        num_frames: int | None = None,
        image: ImageCondition | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            student: the bare module, with whole parameters.
            prompt_embeds: [N, L, D] on the student's device.
            times: when to denoise.
            latent_size: (H, W).
            num_frames: F of the whole video; None for no end, which needs the student's window.
            image: what an image-to-video student sees of its image, for every frame that will be generated.
        Raises:
            ValueError: the prompts do not fit, or neither a length nor a window bounds the memory.
        """
        self.student = student
        self.times = times
        self._image = image or ImageCondition()
        self._prompt = student.prompt_keys_values(prompt_embeds, image=image)
        device = prompt_embeds.device
        self._cache = student.new_cache(len(prompt_embeds), num_frames, latent_size, device=device)
        self._unwritten: tuple[Tensor, Tensor | None] | None = None  # the finished chunk and its context noise
        self.num_chunks = 0  # chunks generated
        self.num_frames = 0  # frames generated

    @property
    def next_chunk_frames(self) -> int:
        """Frames K of the chunk that `next_chunk` generates."""
        shape = self.student.shape
        return shape.chunk_frames if self.num_chunks else shape.first_chunk_frames or shape.chunk_frames

    @torch.no_grad()
    def next_chunk(self, noise: Tensor) -> Tensor:
        """Generate one more chunk.

        Args:
            noise: [N, S, C, K, H, W] standard normal; step s reads noise[:, s], the context noise is the last.
        Returns:
            x0 [N, C, K, H, W] in the noise's dtype.
        Raises:
            ValueError: too little noise, another chunk length, or the video is over.
        """
        length, start = self.next_chunk_frames, self.num_frames
        if noise.ndim != 6 or noise.shape[1] < self.times.num_noises or noise.shape[3] != length:
            raise ValueError(
                f"noise must be [N, {self.times.num_noises}, C, {length}, H, W] for this chunk, got {list(noise.shape)}"
            )
        self._write_context()
        self._cache.begin_chunk(length)
        times = self.times.of_chunk(self.num_chunks)
        t = _times_like(noise, length)
        x_t = x0 = noise[:, 0]
        for step, time in enumerate(times):
            v = self._velocity(x_t, t.fill_(time), start)
            x0 = x0_from_velocity(x_t, v, t)
            if step + 1 < len(times):
                x_t = add_noise(x0, noise[:, step + 1], t.fill_(times[step + 1]))
        context_noise = noise[:, self.times.num_noises - 1] if self.times.context_noise else None
        self._finish(x0, context_noise)
        return x0

    @torch.no_grad()
    def give_chunk(self, x0: Tensor, context_noise: Tensor | None = None) -> None:
        """Take the next chunk as given instead of generating it: a first frame to continue, or a whole beginning.

        Args:
            x0: clean latents [N, C, K, H, W].
            context_noise: standard normal like x0; needed where the context is noised.
        Raises:
            ValueError: another chunk length, or context noise is missing.
        """
        if x0.ndim != 5 or x0.shape[2] != self.next_chunk_frames:
            raise ValueError(f"x0 must be [N, C, {self.next_chunk_frames}, H, W] for this chunk, got {list(x0.shape)}")
        if self.times.context_noise and (context_noise is None or context_noise.shape != x0.shape):
            got = None if context_noise is None else list(context_noise.shape)
            raise ValueError(f"context_noise must be {list(x0.shape)} like x0, got {got}")
        self._write_context()
        self._cache.begin_chunk(x0.shape[2])
        self._finish(x0, context_noise if self.times.context_noise else None)

    def _finish(self, x0: Tensor, context_noise: Tensor | None) -> None:
        self._unwritten = (x0, context_noise)
        self.num_chunks += 1
        self.num_frames += x0.shape[2]

    def _velocity(self, x_t: Tensor, t: Tensor, start: int) -> Tensor:
        """Velocity of the current chunk, whose first frame is `start`, against the cache."""
        image = self._image.frames(start, start + x_t.shape[2])
        return self.student.forward_chunk(x_t, t, self._prompt, self._cache, frame_offset=start, image=image)

    @torch.no_grad()
    def set_prompt(self, prompt_embeds: Tensor) -> None:
        """Go on with other prompts [N, L, D]; what has been generated stays context, written under its own prompt."""
        self._write_context()
        self._prompt = self.student.prompt_keys_values(prompt_embeds, image=self._image)

    def _write_context(self) -> None:
        """Overwrite the last chunk's noisy keys and values by those of the finished chunk."""
        if self._unwritten is None:
            return
        x0, eps = self._unwritten
        t = _times_like(x0, x0.shape[2]).fill_(self.times.context_noise)
        x_t = x0 if eps is None else add_noise(x0, eps, t)
        start = self.num_frames - x0.shape[2]
        self._velocity(x_t, t, start)
        self._unwritten = None


def _times_like(latents: Tensor, num_frames: int) -> Tensor:
    """Uninitialised times [N, frames], at least float32."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return latents.new_empty(latents.shape[0], num_frames, dtype=dtype)


def rollout(
    student: CausalStudent,
    prompt_embeds: Tensor,
    noise: Tensor,
    times: SamplerTimes,
    *,
    image: ImageCondition | None = None,
    first_chunk: Tensor | None = None,
) -> Tensor:
    """Generate whole videos; see `RolloutSampler`.

    Args:
        student: the bare module, with whole parameters.
        prompt_embeds: [N, L, D].
        noise: [N, S, C, F, H, W]; a chunk reads noise[:, :, :, its frames].
        times: when to denoise; S = times.num_noises.
        image: what an image-to-video student sees of its image.
        first_chunk: clean latents [N, C, K, H, W] to begin with instead of generating them.
    Returns:
        [N, C, F, H, W] latents in the noise's dtype.
    Raises:
        ValueError: noise and times disagree, or the video does not divide into chunks.
    """
    if noise.ndim != 6 or noise.shape[1] != times.num_noises:
        raise ValueError(
            f"noise must be [N, {times.num_noises}, C, F, H, W] for {times.describe()}, got {list(noise.shape)}"
        )
    num_frames, height, width = noise.shape[3:]
    spans = chunk_spans(student.shape, num_frames)
    sampler = RolloutSampler(
        student, prompt_embeds, times, latent_size=(height, width), num_frames=num_frames, image=image
    )
    chunks: list[Tensor] = []
    for start, end in spans:
        eps = noise[:, :, :, start:end]
        if first_chunk is not None and not chunks:
            sampler.give_chunk(first_chunk, eps[:, -1])
            chunks.append(first_chunk.to(noise.dtype))
        else:
            chunks.append(sampler.next_chunk(eps))
    return torch.cat(chunks, dim=2)


def chunk_spans(shape: StudentShape, num_frames: int) -> tuple[tuple[int, int], ...]:
    """Frames [start, end) of every chunk.

    Raises:
        ValueError: the video does not divide into the student's chunks.
    """
    return layout.whole_chunk_spans(num_frames, shape.chunk_frames, shape.first_chunk_frames)
