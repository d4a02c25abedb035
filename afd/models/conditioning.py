"""What the student is conditioned on besides latents: time, prompt, and for image-to-video models an image.

Parameter names are diffusers' (`condition_embedder.*`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.config import StudentShape

TRAIN_TIMESTEPS = 1000  # the time embedding sees 1000 t


@dataclass(frozen=True)
class ImageCondition:
    """What an image-to-video student sees of its image.

    Attributes:
        latents: [N, in_channels - out_channels, F, H, W], concatenated to the noisy (and clean) latents: Wan2.1 I2V
            gives 4 mask channels (1 where a frame is known) and the 16 latent channels of the known frames, else 0.
        embeds: [N, tokens, image_dim] from the image encoder, or None for models without an image embedder.
    """

    latents: Tensor | None = None
    embeds: Tensor | None = None

    def frames(self, start: int, end: int) -> ImageCondition:
        """The condition of frames [start, end)."""
        return ImageCondition(None if self.latents is None else self.latents[:, :, start:end], self.embeds)


class _MLP(nn.Module):
    """Linear, activation, Linear with diffusers' names linear_1 and linear_2."""

    def __init__(self, dim_in: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class _Expand(nn.Module):
    """Linear and GELU; diffusers calls the linear layer `proj`."""

    def __init__(self, dim: int, ffn_dim: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Linear, GELU, Linear with diffusers' names net.0.proj and net.2."""

    def __init__(self, dim: int, ffn_dim: int, *, dim_out: int | None = None, approximate: str = "tanh") -> None:
        super().__init__()
        expand = _Expand(dim, ffn_dim, approximate)
        self.net = nn.ModuleList([expand, nn.Identity(), nn.Linear(ffn_dim, dim_out or dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., dim]."""
        return self.net[2](self.net[0](x))


class _ImageEmbedder(nn.Module):
    """Image encoder's tokens to the model's width: LayerNorm, exact-GELU feed-forward, LayerNorm.

    Source: Wan2.1 wan/modules/model.py MLPProj (epsilon is LayerNorm's 1e-5, not the model's).
    """

    def __init__(self, image_dim: int, dim: int, image_tokens: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, dim_out=dim, approximate="none")
        self.norm2 = nn.LayerNorm(dim)
        # Only first-and-last-frame models know positions: their two images' tokens come one after the other.
        self.pos_embed = None if image_tokens is None else nn.Parameter(torch.zeros(1, image_tokens, image_dim))

    def forward(self, embeds: Tensor) -> Tensor:
        """[N, tokens, image_dim] -> [N, tokens, dim]."""
        if self.pos_embed is not None:
            embeds = embeds + self.pos_embed
        return self.norm2(self.ff(self.norm1(embeds)))


class ConditionEmbedder(nn.Module):
    """Time, text and image embeddings shared by all blocks."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        dim = shape.dim
        self.freq_dim = shape.freq_dim
        self.numerics = shape.numerics
        self.time_embedder = _MLP(shape.freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = _MLP(shape.text_dim, dim, nn.GELU(approximate="tanh"))
        self.image_embedder = None
        if shape.image_dim is not None:
            self.image_embedder = _ImageEmbedder(shape.image_dim, dim, shape.image_tokens)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embed per-frame times t [N, F] in [0, 1]: -> [N, F, dim] and the blocks' modulation [N, F, 6, dim]."""
        time = self.time_embedder(self.sinusoid(t).to(self.time_proj.weight.dtype))
        return time, self.time_proj(F.silu(time)).unflatten(-1, (6, -1))

    def sinusoid(self, t: Tensor) -> Tensor:
        """cos | sin of 1000 t times the frequencies 10000^(-i / half): [N, F, freq_dim].

        In float64 as the original computes it; `numerics: diffusers` has frequencies rounded to float32 and float32
        angles (up to 1000 rad: errors of 3e-5), float64 ones for float64 t.
        """
        half = self.freq_dim // 2
        if self.numerics == "diffusers":
            index = torch.arange(half, dtype=torch.float32, device=t.device)
            frequencies = torch.exp(-math.log(10000.0) * index / half)
            angles = (TRAIN_TIMESTEPS * (t if t.dtype == torch.float64 else t.float()))[..., None] * frequencies
        else:
            powers = torch.arange(half, dtype=torch.float64, device=t.device) / half
            angles = TRAIN_TIMESTEPS * t.double()[..., None] * torch.pow(10000.0, -powers)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def embed_prompt(self, prompt_embeds: Tensor, image_embeds: Tensor | None, text_len: int) -> Tensor:
        """Embedded prompt, zero-padded to text_len before embedding, then the image's tokens: [N, text_len + I, dim].

        Raises:
            ValueError: the embeddings do not fit the model.
        """
        width = self.text_embedder.linear_1.in_features
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[1] > text_len or prompt_embeds.shape[2] != width:
            raise ValueError(f"prompt_embeds must be [N, up to {text_len}, {width}], got {list(prompt_embeds.shape)}")
        dtype = self.time_proj.weight.dtype
        padded = F.pad(prompt_embeds.to(dtype), (0, 0, 0, text_len - prompt_embeds.shape[1]))
        prompt = self.text_embedder(padded)
        if self.image_embedder is None:
            if image_embeds is not None:
                raise ValueError("image.embeds must be None: this student has no image embedder (image_dim is None)")
            return prompt
        width = self.image_embedder.norm1.normalized_shape[0]
        tokens = None if self.image_embedder.pos_embed is None else self.image_embedder.pos_embed.shape[1]
        expected = f"[{prompt_embeds.shape[0]}, {tokens or 'tokens'}, {width}]"
        if image_embeds is None:
            raise ValueError(f"image.embeds must be {expected} for this image-to-video student, got None")
        if image_embeds.ndim != 3 or image_embeds.shape[::2] != (prompt_embeds.shape[0], width):
            raise ValueError(f"image.embeds must be {expected}, got {list(image_embeds.shape)}")
        if tokens is not None and image_embeds.shape[1] != tokens:
            raise ValueError(f"image.embeds must be {expected}, got {list(image_embeds.shape)}")
        return torch.cat([prompt, self.image_embedder(image_embeds.to(dtype))], dim=1)
