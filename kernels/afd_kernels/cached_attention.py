"""Attention of one chunk of queries against the visible part of a KV cache, for rollouts: `cached_attention`.

Maskless by construction: the caller passes exactly the keys the chunk sees (`BlockCausalLayout.visible_frames`). Owns
no cache. Shapes are host integers, so nothing here synchronises with the device.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from afd_kernels.block_causal_attention_reference import dense_attention_reference


def cached_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str | None = None) -> Tensor:
    """softmax(scale q k^T) v over all given keys.

    Args:
        q: [B, heads, Nq, D], the chunk being generated.
        k, v: [B, heads, Nk, D], cached and own keys and values; views of a cache are fine.
        scale: None for 1 / sqrt(D).
        impl: `reference` or `sdpa`; None picks for the device.
    Returns:
        [B, heads, Nq, D] in q's dtype.
    Raises:
        ValueError: shapes or dtypes disagree, or the implementation is unknown.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must be [B, heads, keys, D] for q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v must be {q.dtype} like q, got {k.dtype} and {v.dtype}")
    if impl in (None, "sdpa"):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if impl == "reference":
        return dense_attention_reference(q, k, v, scale=scale)
    raise ValueError(f"impl must be one of reference, sdpa, got {impl!r}")
