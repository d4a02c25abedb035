"""Self- and cross-attention of a Wan block, with diffusers' parameter names.

The projections live here; normalisation with RoPE and the attention itself are the kernels' (`afd_kernels`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.models.kv_cache import LayerCache
from afd_kernels import BlockCausalLayout, block_causal_attention, rope_qk_norm


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in at least float32, cast back, then times weight (Wan's order).

    `numerics: diffusers` multiplies first and casts back once, as `torch.nn.RMSNorm` does.
    """

    def __init__(self, dim: int, eps: float, numerics: str = "wan") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.numerics == "diffusers":
            return (normed * self.weight).to(x.dtype)
        return normed.to(x.dtype) * self.weight


def rotate_pairs(x: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Turn adjacent pairs of x [N, heads, tokens, head_dim] by the table's angles [tokens, head_dim / 2] in `dtype`."""
    cos, sin = (table.to(dtype) for table in rope)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class _Projections(nn.Module):
    """to_q, to_k, to_v, to_out.0 and the full-width query/key norms."""

    def __init__(self, dim: int, num_heads: int, eps: float, numerics: str = "wan") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.numerics = numerics
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps, numerics)
        self.norm_k = RMSNorm(dim, eps, numerics)

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
        cache: LayerCache | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [N, tokens, dim].
            rope: cos, sin [tokens, head_dim / 2].
            layout: who sees whom in a pass over the whole video; exactly one of layout and cache is given.
            cache: this layer's: x is the current chunk, which sees the cached frames and itself.
            impl: implementation of the block-causal attention; None picks by device.
        Returns:
            [N, tokens, dim].
        """
        q, k = self._rotated_queries_keys(x, rope)
        v = self.split_heads(self.to_v(x))
        if cache is not None:
            return self.project_out(cache.attend(q, k, v))
        assert layout is not None
        return self.project_out(block_causal_attention(q, k, v, layout, impl=impl))

    def _rotated_queries_keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = self.to_q(x), self.to_k(x)
        if self.numerics == "wan":
            weights = self.norm_q.weight, self.norm_k.weight
            return rope_qk_norm(q, k, *weights, *rope, num_heads=self.num_heads, eps=self.norm_q.eps)
        wide = torch.float64 if self.numerics == "wan_float64" or x.dtype == torch.float64 else torch.float32
        q, k = self.split_heads(self.norm_q(q)), self.split_heads(self.norm_k(k))
        return rotate_pairs(q, rope, wide), rotate_pairs(k, rope, wide)


class CrossAttention(_Projections):
    """Attention to the prompt; its keys and values depend on the prompt alone, so rollouts compute them once.

    Image-to-video models attend to the image's tokens beside it, with keys and values of their own, and add the two.
    """

    def __init__(
        self, dim: int, num_heads: int, eps: float, numerics: str = "wan", *, image_after: int | None = None
    ) -> None:
        """Build.

        Args:
            dim, num_heads, eps, numerics: see `StudentShape`.
            image_after: tokens of text before the image's in the context; None for models without an image.
        """
        super().__init__(dim, num_heads, eps, numerics)
        self.image_after = image_after
        if image_after is not None:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = RMSNorm(dim, eps, numerics)

    def prompt_keys_values(self, context: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [N, heads, L, head_dim] of the embedded prompt [N, L (+ I), dim], then the image's."""
        text = context if self.image_after is None else context[:, : self.image_after]
        keys_values = self.split_heads(self.norm_k(self.to_k(text))), self.split_heads(self.to_v(text))
        if self.image_after is None:
            return keys_values
        image = context[:, self.image_after :]
        keys = self.split_heads(self.norm_added_k(self.add_k_proj(image)))
        return *keys_values, keys, self.split_heads(self.add_v_proj(image))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, ...]) -> Tensor:
        """Attend from x [N, tokens, dim] to the prompt's keys and values; [N, tokens, dim]."""
        q = self.split_heads(self.norm_q(self.to_q(x)))
        attended = F.scaled_dot_product_attention(q, keys_values[0], keys_values[1])
        if len(keys_values) > 2:
            attended = attended + F.scaled_dot_product_attention(q, keys_values[2], keys_values[3])
        return self.project_out(attended)
