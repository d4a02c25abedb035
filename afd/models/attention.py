"""Self- and cross-attention of a Wan block, with diffusers' parameter names.

The projections live here; normalisation with RoPE and the attention itself are the kernels' (`afd_kernels`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.models.kv_cache import KVCache
from afd_kernels import BlockCausalLayout, block_causal_attention, cached_attention, rope_qk_norm


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in at least float32, cast back, then times weight (Wan's order)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class _Projections(nn.Module):
    """to_q, to_k, to_v, to_out.0 and the full-width query/key norms."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def split_heads(self, x: Tensor) -> Tensor:
        """[N, tokens, heads * head_dim] -> [N, heads, tokens, head_dim]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def project_out(self, heads: Tensor) -> Tensor:
        """[N, heads, tokens, head_dim] -> [N, tokens, dim]."""
        return self.to_out[0](heads.transpose(1, 2).flatten(2))


class CausalSelfAttention(_Projections):
    """Self-attention over frames: one block-causal pass in training, one cached chunk in rollouts."""

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        layout: BlockCausalLayout | None = None,
        cache: tuple[KVCache, int] | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [N, tokens, dim].
            rope: cos, sin [tokens, head_dim / 2].
            layout: who sees whom in a pass over the whole video; exactly one of layout and cache is given.
            cache: (cache, layer index): x is the current chunk, which sees the cached frames and itself.
            impl: implementation of the block-causal attention; None picks by device.
        Returns:
            [N, tokens, dim].
        """
        q, k = rope_qk_norm(
            self.to_q(x),
            self.to_k(x),
            self.norm_q.weight,
            self.norm_k.weight,
            *rope,
            num_heads=self.num_heads,
            eps=self.norm_q.eps,
        )
        v = self.split_heads(self.to_v(x))
        if cache is not None:
            keys, values = cache[0].put(cache[1], k, v)
            return self.project_out(cached_attention(q, keys, values))
        assert layout is not None
        return self.project_out(block_causal_attention(q, k, v, layout, impl=impl))


class CrossAttention(_Projections):
    """Attention to the prompt; its keys and values depend on the prompt alone, so rollouts compute them once."""

    def prompt_keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, heads, L, head_dim] of the embedded prompt [N, L, dim]."""
        return self.split_heads(self.norm_k(self.to_k(context))), self.split_heads(self.to_v(context))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Attend from x [N, tokens, dim] to the prompt's keys and values; [N, tokens, dim]."""
        q = self.split_heads(self.norm_q(self.to_q(x)))
        return self.project_out(F.scaled_dot_product_attention(q, *keys_values))
