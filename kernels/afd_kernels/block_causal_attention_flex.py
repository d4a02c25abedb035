"""Block-causal attention through FlexAttention: compiled on CUDA, eager on CPU (where it has no backward)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afd_kernels.dispatch import wants_grad
from afd_kernels.layout import BlockCausalLayout

FLEX_NEEDS_CUDA = "impl='flex' has no backward on CPU; use impl='chunks' or 'reference'"


@functools.lru_cache(maxsize=16)
def _block_mask(layout: BlockCausalLayout, device: torch.device) -> Any:
    return layout.block_mask(device)


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention through torch.compile, once per process."""
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past the recompilation limit it fails, where it would else form the whole score matrix in silence.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex_attention(is_cuda: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled_flex_attention() if is_cuda else flex_attention


def block_causal_attention_flex(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, *, scale: float | None = None
) -> Tensor:
    """FlexAttention under the layout's BlockMask.

    Args:
        q, k, v: [B, heads, N, D] with N == layout.num_tokens.
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, N, D] in q's dtype.
    Raises:
        ValueError: gradients are wanted on CPU.
    """
    if not q.is_cuda and wants_grad(q, k, v):
        raise ValueError(FLEX_NEEDS_CUDA)
    return _flex_attention(q.is_cuda)(q, k, v, block_mask=_block_mask(layout, q.device), scale=scale)
