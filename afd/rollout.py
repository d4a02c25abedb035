"""Chunk-by-chunk generation with a KV cache: the student's sampler, used in training and afterwards alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afd.diffusion.flow_matching import add_noise, x0_from_velocity
from afd.distributed import seeded_generator
from afd.models.student import CausalStudent


def rollout_noise(keys: Sequence[Sequence[int]], num_steps: int, latents_shape: Sequence[int]) -> Tensor:
    """All the noise of N rollouts, each row from its own seed, so that it does not depend on ranks or batching.

    Args:
        keys: N tuples of integers, e.g. (seed, step, sample id, rollout index).
        num_steps: denoising steps S per chunk.
        latents_shape: (C, F, H, W).
    Returns:
        [N, S, C, F, H, W] float32 on the CPU.
    """
    rows = [torch.randn((num_steps, *latents_shape), generator=seeded_generator(*key)) for key in keys]
    return torch.stack(rows)


@torch.no_grad()
def rollout(student: CausalStudent, prompt_embeds: Tensor, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Generate videos: per chunk predict x0 at each time, re-noise it with fresh noise to the next, then cache it.

    A deterministic function of the noise. The clean chunk is run once more at t = 0 to write its keys and values, which
    is what the teacher-forcing training forward sees as context.

    Args:
        student: the bare module, with whole parameters.
        prompt_embeds: [N, L, D].
        noise: [N, S, C, F, H, W]; step s of a chunk reads noise[:, s, :, frames of the chunk].
        times: S times in (0, 1], decreasing.
    Returns:
        [N, C, F, H, W] latents in the noise's dtype.
    Raises:
        ValueError: noise and times disagree.
    Source: Self-Forcing pipeline/causal_inference.py (the procedure).
    """
    if noise.ndim != 6 or noise.shape[1] != len(times):
        raise ValueError(f"noise must be [N, {len(times)}, C, F, H, W] for {len(times)} times, got {list(noise.shape)}")
    n, _, channels, num_frames, height, width = noise.shape
    latents = noise.new_zeros(n, channels, num_frames, height, width)
    cache = student.new_cache(latents.shape, device=noise.device, dtype=noise.dtype)
    prompt = student.prompt_keys_values(prompt_embeds)
    for start, end in chunk_spans(student, num_frames):
        cache.begin_chunk(end - start)
        eps = noise[:, :, :, start:end]  # [N, S, C, K, H, W]
        t = noise.new_empty(n, end - start)
        x_t = x0 = eps[:, 0]
        for step, time in enumerate(times):
            v = student.forward_chunk(x_t, t.fill_(time), prompt, cache, frame_offset=start)
            x0 = x0_from_velocity(x_t, v, t)
            if step + 1 < len(times):
                x_t = add_noise(x0, eps[:, step + 1], t.fill_(times[step + 1]))
        latents[:, :, start:end] = x0
        if end < num_frames:
            student.forward_chunk(x0, t.zero_(), prompt, cache, frame_offset=start)
    return latents


def chunk_spans(student: CausalStudent, num_frames: int) -> list[tuple[int, int]]:
    """Frames [start, end) of every chunk.

    Raises:
        ValueError: the video does not divide into the student's chunks.
    """
    first = student.shape.first_chunk_frames or student.shape.chunk_frames
    if num_frames < first or (num_frames - first) % student.shape.chunk_frames:
        raise ValueError(
            f"num_frames must be {first} + a multiple of chunk_frames = {student.shape.chunk_frames}, got {num_frames}"
        )
    starts = [0, *range(first, num_frames, student.shape.chunk_frames)]
    return list(zip(starts, [*starts[1:], num_frames], strict=True))
