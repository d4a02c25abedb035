"""The student's self-attention over video chunks: `block_causal_attention`, and how its implementation is chosen.

The name is the maths; `impl=` is how. Owns argument checks and the default table; each implementation lives in its own
`block_causal_attention_<impl>.py` and is imported on first use.
"""

from __future__ import annotations

import logging

from torch import Tensor

from afd_kernels.block_causal_attention_chunks import block_causal_attention_chunks
from afd_kernels.block_causal_attention_reference import block_causal_attention_reference
from afd_kernels.layout import BlockCausalLayout

logger = logging.getLogger(__name__)

IMPLS = ("reference", "chunks")


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, *, impl: str | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T, over the keys the layout shows) v, with gradients for q, k and v.

    Args:
        q, k, v: [B, heads, N, D], N == layout.num_tokens; any batch and head strides. With teacher forcing the clean
            frames come first, then the noisy ones.
        layout: who sees whom.
        impl: one of `IMPLS`; None picks the default for the device.
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, N, D] in q's dtype.
    Raises:
        ValueError: shapes or dtypes disagree, or the implementation is unknown.
    """
    _check(q, k, v, layout)
    if (impl or "chunks") == "chunks":
        return block_causal_attention_chunks(q, k, v, layout, scale=scale)
    if impl == "reference":
        return block_causal_attention_reference(q, k, v, layout, scale=scale)
    raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout) -> None:
    if q.ndim != 4 or q.shape[2] != layout.num_tokens:
        raise ValueError(f"q must be [B, heads, {layout.num_tokens}, D] for this layout, got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point, got {q.dtype}")


__all__ = ["IMPLS", "BlockCausalLayout", "block_causal_attention"]
