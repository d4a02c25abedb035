"""Block-causal attention as one packed call: every chunk is a segment with its own keys, gathered side by side.

One launch instead of one per chunk; it pays with a copy of the keys every segment sees. Owns the packing; the packed
kernel comes from `varlen_backend`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from afd_kernels.block_causal_attention_backends import VarlenAttention
from afd_kernels.layout import BlockCausalLayout


class Packing(NamedTuple):
    """Where the keys of every segment come from, for a batch.

    key_rows: [keys] int64 rows of one sequence, all segments in order (the same for every sample).
    query_starts, key_starts: [B * segments + 1] int32 cumulative lengths.
    longest_query, longest_key: longest segment.
    """

    key_rows: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


@functools.lru_cache(maxsize=16)
def packing(layout: BlockCausalLayout, batch: int, device: torch.device) -> Packing:
    """The segments of `layout.strips`, repeated for every sample of the batch."""
    spans = [torch.arange(start, end) for strip in layout.strips for start, end in strip.ranges]
    queries = [strip.end - strip.start for strip in layout.strips]
    keys = [sum(end - start for start, end in strip.ranges) for strip in layout.strips]

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths * batch]).cumsum(0).to(device=device, dtype=torch.int32)

    return Packing(torch.cat(spans).to(device), starts(queries), starts(keys), max(queries), max(keys))


def block_causal_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockCausalLayout,
    *,
    attend: VarlenAttention,
    scale: float | None = None,
) -> Tensor:
    """Attention of all chunks in one packed call; autograd adds the gradients of keys that several segments see.

    Args:
        q, k, v: [B, heads, N, D] with N == layout.num_tokens.
        attend: packed attention on [tokens, heads, D].
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, N, D] view of a [B, N, heads, D] tensor, in q's dtype.
    """
    batch, heads, rows, head_dim = q.shape
    pack = packing(layout, batch, q.device)

    def gathered(x: Tensor) -> Tensor:  # [B * keys, heads, D]
        return x.transpose(1, 2).index_select(1, pack.key_rows).reshape(-1, heads, head_dim)

    queries = q.transpose(1, 2).reshape(batch * rows, heads, head_dim)
    out = attend(queries, gathered(k), gathered(v), *pack[1:], scale)
    return out.view(batch, rows, heads, head_dim).transpose(1, 2)
