"""Block-causal attention as one dense call per chunk, with dK and dV accumulated across the calls.

Every chunk of queries sees a few full key ranges, so ordinary dense attention over their concatenation is exact: no
mask, any fast dense kernel. Owns the loop and its backward; the dense kernels come from `dense_attention`.

Plain autograd through the key slices would allocate and add one zero-padded full-length gradient per chunk. The
`autograd.Function` here keeps one small graph per chunk instead and adds each chunk's key gradients into one buffer,
in float32 for half precision inputs, so the sum over chunks is not rounded once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from afd_kernels.dispatch import wants_grad
from afd_kernels.layout import BlockCausalLayout, Range

DenseAttention = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """PyTorch's own dense attention (flash, cuDNN or the CPU kernel, as it picks)."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _gather(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """Rows of the key ranges, [B, heads, keys, D]: a view for one range, a copy for several."""
    if len(ranges) == 1:
        return x[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([x[:, :, start:end] for start, end in ranges], dim=2)


def _scatter_add(total: Tensor, part: Tensor, ranges: tuple[Range, ...]) -> None:
    """Add the rows of `part` (in the order of `_gather`) to the rows of `total` they came from."""
    sizes = [end - start for start, end in ranges]
    for (start, end), rows in zip(ranges, part.split(sizes, dim=2), strict=True):
        total[:, :, start:end] += rows


class _ChunkLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, dense: DenseAttention, scale: float | None
    ) -> Tensor:
        out = torch.empty_like(q)
        graphs = []
        for strip in layout.strips:
            queries = q.detach()[:, :, strip.start : strip.end].requires_grad_()
            keys = _gather(k.detach(), strip.ranges).requires_grad_()
            values = _gather(v.detach(), strip.ranges).requires_grad_()
            with torch.enable_grad():
                part = dense(queries, keys, values, scale)
            out[:, :, strip.start : strip.end] = part.detach()
            graphs.append((part, queries, keys, values))
        ctx.graphs, ctx.layout, ctx.like = graphs, layout, (q, k, v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.graphs is None:
            raise RuntimeError("the chunk loop's graph was freed by its first backward; retain_graph is not supported")
        graphs, ctx.graphs = ctx.graphs, None
        # A caller that still holds the output holds this node too, but need not hold q, k and v with it.
        (q, k, v), ctx.like = ctx.like, None
        total = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k, dtype=total)
        dv = torch.zeros_like(v, dtype=total)
        for strip in ctx.layout.strips:
            part, *inputs = graphs.pop(0)
            rows = slice(strip.start, strip.end)
            grad_queries, grad_keys, grad_values = torch.autograd.grad(part, inputs, grad_out[:, :, rows])
            dq[:, :, rows] = grad_queries
            _scatter_add(dk, grad_keys, strip.ranges)
            _scatter_add(dv, grad_values, strip.ranges)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def block_causal_attention_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockCausalLayout,
    *,
    scale: float | None = None,
    dense: DenseAttention = sdpa,
) -> Tensor:
    """Attention of every chunk against its key ranges, one dense call each.

    Args:
        q, k, v: [B, heads, N, D] with N == layout.num_tokens.
        scale: None for 1 / sqrt(D).
        dense: maskless attention on [B, heads, queries, D] x [B, heads, keys, D].
    Returns:
        [B, heads, N, D] in q's dtype and strides.
    """
    if wants_grad(q, k, v):
        return _ChunkLoop.apply(q, k, v, layout, dense, scale)  # pyright: ignore[reportReturnType]
    out = torch.empty_like(q)
    for strip in layout.strips:
        keys, values = _gather(k, strip.ranges), _gather(v, strip.ranges)
        out[:, :, strip.start : strip.end] = dense(q[:, :, strip.start : strip.end], keys, values, scale)
    return out
