"""Attention of one chunk of queries against the visible part of a KV cache, for rollouts: `cached_attention`.

Maskless by construction: the keys given, or the `key_ranges` of them, are exactly what the chunk sees
(`BlockCausalLayout.visible_frames`: window and sink). Owns no cache. Every size is a host integer: nothing here waits
for the device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from afd_kernels.attention_defaults import default_impl
from afd_kernels.block_causal_attention_reference import dense_attention_reference
from afd_kernels.dispatch import wants_grad
from afd_kernels.layout import Range

IMPLS = ("reference", "sdpa", "flash3", "flash2", "cudnn", "hub3", "hub2", "triton")


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    impl: str | None = None,
    key_ranges: tuple[Range, ...] | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over all given keys, or over some ranges of them.

    Args:
        q: [B, heads, Nq, D], the chunk being generated.
        k, v: [B, heads, Nk, D], cached and own keys and values; views of a cache are fine.
        scale: None for 1 / sqrt(D).
        impl: one of IMPLS; None for the fastest that was measured on the device and can run here, else the best
            installed dense kernel. FlashAttention and `triton` split the keys where queries are few.
        key_ranges: disjoint (start, end) rows of k and v that the chunk sees, such as sink and window; None for all.
            `triton` reads at most two in place, the others gather several.
    Returns:
        [B, heads, Nq, D] in q's dtype.
    Raises:
        ValueError: shapes, dtypes or ranges disagree, or the implementation is unknown or cannot take the inputs.
        ImportError: the implementation is not installed; the text says how to install it.
    """
    ranges = _check(q, k, v, key_ranges)
    chosen = impl or _default(q.device, q.dtype, q.shape[-1], len(ranges), wants_grad(q, k, v))
    if chosen not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if chosen == "triton":
        from afd_kernels.cached_attention_triton import cached_attention_triton

        return cached_attention_triton(q, k, v, ranges, scale=scale)
    if ranges != ((0, k.shape[2]),):
        k, v = (_rows(x, ranges) for x in (k, v))
    if chosen == "reference":
        return dense_attention_reference(q, k, v, scale=scale)
    from afd_kernels.block_causal_attention_backends import dense_backend

    return dense_backend(chosen)(q, k, v, scale)


@functools.cache
def _default(device: torch.device, dtype: torch.dtype, head_dim: int, num_ranges: int, has_grad: bool) -> str:
    from afd_kernels import block_causal_attention_backends as backends
    from afd_kernels.cached_attention_triton import check_cached_support

    def check(name: str) -> None:
        if name == "triton":
            check_cached_support(device, dtype, head_dim, num_ranges, has_grad)
        else:
            backends.check_usable(name, backends.DENSE_BACKENDS, device, dtype)

    fallback = backends.best_dense_backend(device, dtype)
    return default_impl("cached_attention", device, dtype, check, fallback)


def _rows(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    parts = [x[:, :, start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _check(q: Tensor, k: Tensor, v: Tensor, key_ranges: tuple[Range, ...] | None) -> tuple[Range, ...]:
    if q.ndim != 4 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must be [B, heads, keys, D] for q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v must be {q.dtype} like q, got {k.dtype} and {v.dtype}")
    if key_ranges is None:
        return ((0, k.shape[2]),)
    edges = [edge for span in key_ranges for edge in span]
    if not edges or edges[0] < 0 or edges[-1] > k.shape[2] or any(end <= start for start, end in key_ranges):
        raise ValueError(f"key_ranges must be non-empty spans of [0, {k.shape[2]}), got {key_ranges}")
    if edges != sorted(edges):
        raise ValueError(f"key_ranges must be in order and disjoint, got {key_ranges}")
    return key_ranges
