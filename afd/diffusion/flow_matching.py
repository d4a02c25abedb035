"""Rectified flow: the noising process, its velocity, the time grids of the few-step samplers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TimeSampling = Literal["grid", "uniform", "logit_normal", "terminal"]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Warp times towards noise: t' = shift t / (1 + (shift - 1) t).

    Args:
        t: any shape, in [0, 1].
        shift: > 0; 1 is the identity, 5 is Self-Forcing's.
    Source: arXiv 2403.03206, eq. 23; Self-Forcing utils/scheduler.py (facts only).
    """
    if shift <= 0:
        raise ValueError(f"shift must be > 0, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def sampler_grid(steps: Sequence[int], *, shift: float) -> tuple[float, ...]:
    """Times visited by a few-step sampler: steps of 1000, warped by `shift`.

    `sampler_grid([1000, 750, 500, 250], shift=5)` is (1.0, 0.9375, 0.8333, 0.625).

    Raises:
        ValueError: steps are empty, not strictly decreasing, or outside (0, 1000].
    """
    ordered = all(a > b for a, b in itertools.pairwise(steps))
    if not steps or not ordered or not (steps[-1] > 0 and steps[0] <= 1000):
        raise ValueError(f"steps must be strictly decreasing integers in (0, 1000], got {list(steps)}")
    return tuple(shift_time(torch.tensor(list(steps), dtype=torch.float64) / 1000, shift).tolist())


def per_frame(t: Tensor, like: Tensor) -> Tensor:
    """Broadcast t [N, F] over latents [N, C, F, H, W]: -> [N, 1, F, 1, 1] in the latents' dtype."""
    return t[:, None, :, None, None].to(like.dtype)


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean latents: x0 = x_t - t v; x_t, v [N, C, F, H, W], t [N, F]."""
    return x_t - per_frame(t, x_t) * v


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Noised latents: x_t = (1 - t) x0 + t eps; x0, eps [N, C, F, H, W], t [N, F]."""
    time = per_frame(t, x0)
    return (1 - time) * x0 + time * eps


def chunk_times(
    uniforms: Tensor,
    *,
    chunk_lengths: Sequence[int],
    sampling: TimeSampling,
    grid: Sequence[float],
    shift: float,
    first_grid: Sequence[float] | None = None,
) -> Tensor:
    """One time per chunk from uniform random numbers, repeated over the chunk's frames.

    Args:
        uniforms: [N, chunks] in [0, 1).
        chunk_lengths: frames of each chunk; they add up to F.
        sampling: "grid" draws from the sampler's own times, "terminal" takes the last of them; "uniform" and
            "logit_normal" draw t and warp it by shift.
        grid: the sampler's times, read for "grid" and "terminal".
        shift: time shift, read for the other two.
        first_grid: the first chunk's own times where they differ.
    Returns:
        [N, F] float32 in [0, 1].
    Raises:
        ValueError: the number of uniforms is not N x chunks, or the sampling is unknown.
    """
    if uniforms.ndim != 2 or uniforms.shape[1] != len(chunk_lengths):
        raise ValueError(
            f"uniforms must be [N, {len(chunk_lengths)}] for chunks of {list(chunk_lengths)} frames, "
            f"got {list(uniforms.shape)}"
        )
    if sampling in ("grid", "terminal"):
        choices = slice(None) if sampling == "grid" else slice(-1, None)
        t = _pick(uniforms, grid[choices])
        if first_grid is not None:
            t[:, :1] = _pick(uniforms[:, :1], first_grid[choices])
    elif sampling == "uniform":
        t = shift_time(uniforms.float(), shift)
    elif sampling == "logit_normal":
        normal = torch.special.ndtri(uniforms.double().clamp(1e-6, 1 - 1e-6))
        t = shift_time(torch.sigmoid(normal).float(), shift)
    else:
        raise ValueError(f"time sampling must be grid, terminal, uniform or logit_normal, got {sampling!r}")
    return t.repeat_interleave(torch.tensor(list(chunk_lengths), device=t.device), dim=1)


def _pick(uniforms: Tensor, grid: Sequence[float]) -> Tensor:
    """Equally likely times of a grid, float32."""
    choices = torch.tensor(list(grid), dtype=torch.float32, device=uniforms.device)
    return choices[(uniforms * len(choices)).long().clamp_max(len(choices) - 1)]
