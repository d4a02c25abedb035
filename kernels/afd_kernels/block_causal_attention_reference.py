"""Block-causal attention in plain PyTorch: the oracle (dense mask). Owns no layout and no fast path."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from afd_kernels.layout import BlockCausalLayout


@functools.lru_cache(maxsize=8)
def _mask(layout: BlockCausalLayout, device: torch.device) -> Tensor:
    return layout.dense_mask(device)


def dense_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v; half precision is computed in float32, other dtypes in their own.

    Args:
        q: [B, heads, Nq, D]; k, v: [B, heads, Nk, D].
        mask: bool [Nq, Nk], True where the query sees the key; None for all.
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, Nq, D] in q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v.to(wide)).to(q.dtype)


def block_causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, *, scale: float | None = None
) -> Tensor:
    """Dense attention under the layout's mask.

    Args:
        q, k, v: [B, heads, N, D], any float dtype, with N == layout.num_tokens.
        layout: who sees whom.
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, N, D] in q's dtype.
    """
    return dense_attention_reference(q, k, v, mask=_mask(layout, q.device), scale=scale)
