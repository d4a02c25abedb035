"""Launches the split-KV kernels of cached attention: how many splits, which tiles.

A one-frame chunk of Wan-1.3B gives 13 query tiles x 12 heads = 156 programs for 132 multiprocessors: two rounds, the
second almost empty. Splitting the keys fills them. Forward only: rollouts take no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from afd_kernels.attention_plans import choose_plan, choose_splits, compute_capability, processors
from afd_kernels.block_causal_attention_triton import (
    allow_descriptors,
    check_support,
    dense_rows,
    scale_of,
    usable_tiles,
)
from afd_kernels.dispatch import wants_grad
from afd_kernels.launching import device_guard
from afd_kernels.layout import Range


def check_cached_support(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_ranges: int, has_grad: bool
) -> None:
    """Check that the kernels run on such inputs.

    Raises:
        ValueError: more than two ranges, gradients wanted, or inputs the kernels cannot take.
    """
    if num_ranges > 2:
        raise ValueError(f"impl='triton' takes one or two key ranges, got {num_ranges}")
    if has_grad:
        raise ValueError("impl='triton' of cached_attention has no backward; use impl='sdpa' or torch.no_grad()")
    check_support(device, dtype, head_dim)


def cached_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: tuple[Range, ...],
    *,
    scale: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention to the rows of a cache in `ranges`, split over the keys; reads the cache in place.

    Args:
        q: [B, heads, Nq, D] float16, bfloat16 or float32.
        k, v: [B, heads, Nk, D], the whole cache.
        ranges: one or two non-empty (start, end) row ranges of the cache.
        scale: > 0; None for 1 / sqrt(D).
        splits: None to choose for the device.
    Returns:
        [B, heads, Nq, D] in q's dtype.
    Raises:
        ValueError: more than two ranges, gradients wanted, or inputs the kernels cannot take.
    """
    from afd_kernels.cached_attention_kernels import join_kernel, split_kernel

    check_cached_support(q.device, q.dtype, q.shape[-1], len(ranges), wants_grad(q, k, v))
    factor = scale_of(q, scale)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, heads, rows, head_dim = q.shape
    slices = batch * heads
    plan = choose_plan(head_dim, q.dtype, None, compute_capability(q.device))
    tiles = usable_tiles(plan, "cached", q, k, v)
    key_tiles = sum(-(-(end - start) // tiles.block_n) for start, end in ranges)
    query_tiles = -(-rows // tiles.block_m)
    wanted = splits or choose_splits(query_tiles * slices, key_tiles, processors(q.device))
    per_split = -(-key_tiles // wanted)
    splits = -(-key_tiles // per_split)  # no empty split
    first, second = (*ranges, (0, 0))[:2]
    parts = torch.empty(splits, slices, rows, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, slices, rows, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    if tiles.tma:
        allow_descriptors(q.device)
    with device_guard(q):
        launch: Any = split_kernel[(query_tiles, slices, splits)]
        launch(
            q, k, v, parts, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, slices, rows, k.shape[2], *first, *second, per_split, factor * math.log2(math.e),
            D=head_dim, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **tiles.launch_options,
        )  # fmt: skip
        launch = join_kernel[(-(-rows // 32), slices)]
        launch(parts, lse, out, *out.stride()[:3], heads, slices, rows, SPLITS=splits, D=head_dim, BLOCK=32)
    return out
