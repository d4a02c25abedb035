"""The latent discriminator: a bidirectional spatio-temporal transformer that scores (clip, prompt).

The student is causal, the discriminator sees the whole clip: full attention is block-causal attention with one chunk,
so both share their attention. Tokens may span several frames, which puts differences between frames in reach of the
first layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from afd.config import DiscriminatorShape
from afd.models.attention import CausalSelfAttention, CrossAttention
from afd.models.score_head import ScoreHead
from afd_kernels import BlockCausalLayout, rope_3d_table


class DiscriminatorBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to the prompt, feed-forward."""

    def __init__(self, shape: DiscriminatorShape) -> None:
        super().__init__()
        dim = shape.dim
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = CausalSelfAttention(dim, shape.num_heads, 1e-6)
        self.attn2 = CrossAttention(dim, shape.num_heads, 1e-6)
        self.expand = nn.Linear(dim, shape.ffn_dim)
        self.contract = nn.Linear(shape.ffn_dim, dim)

    def forward(self, x: Tensor, prompt: Tensor, rope: tuple[Tensor, Tensor], layout: BlockCausalLayout) -> Tensor:
        """Transform tokens x [N, tokens, dim] given the embedded prompt [N, L, dim]."""
        x = x + self.attn1(self.norm1(x), rope, layout=layout)
        x = x + self.attn2(self.norm2(x), self.attn2.prompt_keys_values(prompt))
        return x + self.contract(F.gelu(self.expand(self.norm3(x))))


class LatentDiscriminator(nn.Module):
    """D(x, y): latents and prompt embeddings to one score per clip."""

    def __init__(self, shape: DiscriminatorShape) -> None:
        super().__init__()
        self.shape = shape
        patch = shape.patch_size
        self.patch_embedding = nn.Conv3d(shape.in_channels, shape.dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Linear(shape.text_dim, shape.dim)
        self.blocks = nn.ModuleList([DiscriminatorBlock(shape) for _ in range(shape.num_layers)])
        self.norm_out = nn.LayerNorm(shape.dim)
        self.head = ScoreHead(shape.dim, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Score clips.

        Args:
            latents: [N, C, F, H, W], any dtype: cast to the weights'; F, H, W divisible by patch_size.
            prompt_embeds: [N, L, D].
        Returns:
            scores [N] float32; 0 for every clip before the first update.
        Raises:
            ValueError: shapes do not fit the model.
        """
        patch = self.shape.patch_size
        sizes = latents.shape[2:]
        if (
            latents.ndim != 5
            or latents.shape[1] != self.shape.in_channels
            or any(size % p for size, p in zip(sizes, patch, strict=True))
        ):
            raise ValueError(
                f"latents must be [N, {self.shape.in_channels}, F, H, W] with F, H, W divisible by {list(patch)}, "
                f"got {list(latents.shape)}"
            )
        frames, rows, columns = (size // p for size, p in zip(sizes, patch, strict=True))
        dtype = self.head.weight.dtype
        x = self.patch_embedding(latents.to(dtype)).flatten(2).transpose(1, 2)
        rope = rope_3d_table(frames, rows, columns, self.shape.head_dim, device=x.device)
        layout = BlockCausalLayout(num_frames=frames, tokens_per_frame=rows * columns, chunk_frames=frames)
        prompt = self.text_embedding(prompt_embeds.to(dtype))
        for block in self.blocks:
            x = block(x, prompt, rope, layout)
        return self.head(self.norm_out(x.mean(dim=1))).squeeze(-1).float()
