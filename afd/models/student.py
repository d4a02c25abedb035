"""The causal Wan-architecture student: chunk-wise autoregressive velocity model with diffusers' parameter names.

One module for every size: the quick start's 0.3 M parameters and Wan 1.3B or 14B differ in `StudentShape` only.
`forward` is the training pass over a whole video (block-causal, or the teacher-forcing layout `[clean | noisy]`);
`forward_chunk` is the same function for one chunk against a KV cache. Sampling loops live in `afd.rollout`.
Source of the numerics: Wan-Video/Wan2.1 wan/modules/model.py and diffusers transformer_wan.py (names).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afd.config import StudentShape
from afd.models.attention import CausalSelfAttention, CrossAttention
from afd.models.kv_cache import KVCache
from afd_kernels import BlockCausalLayout, adaln_modulate, gated_residual, rope_3d_table

TRAIN_TIMESTEPS = 1000  # the time embedding sees 1000 t
PromptKeysValues = Sequence[tuple[Tensor, Tensor]]


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
    """Linear and tanh-GELU; diffusers calls the linear layer `proj`."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class _FeedForward(nn.Module):
    """GELU(tanh) feed-forward with diffusers' names net.0.proj and net.2."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Expand(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _ConditionEmbedder(nn.Module):
    """Time and text embeddings shared by all blocks."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        dim = shape.dim
        self.freq_dim = shape.freq_dim
        self.time_embedder = _MLP(shape.freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = _MLP(shape.text_dim, dim, nn.GELU(approximate="tanh"))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embed per-frame times t [N, F] in [0, 1]: -> [N, F, dim] and the blocks' modulation [N, F, 6, dim]."""
        half = self.freq_dim // 2
        powers = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = TRAIN_TIMESTEPS * t.double()[..., None] * torch.pow(10000.0, -powers)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.time_proj.weight.dtype)
        time = self.time_embedder(sinusoid)
        return time, self.time_proj(F.silu(time)).unflatten(-1, (6, -1))


class CausalBlock(nn.Module):
    """One Wan transformer block with per-frame modulation. ZeRO-3 gathers it as a whole (a leaf module)."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        dim, eps = shape.dim, shape.eps
        self.eps = eps
        self.attn1 = CausalSelfAttention(dim, shape.num_heads, eps)
        self.attn2 = CrossAttention(dim, shape.num_heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps) if shape.cross_attn_norm else nn.Identity()
        self.ffn = _FeedForward(dim, shape.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        prompt: Tensor | tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        layout: BlockCausalLayout | None,
        cache: tuple[KVCache, int] | None,
        attention_impl: str | None,
    ) -> Tensor:
        """Transform tokens x [N, tokens, dim].

        Args:
            modulation: [N, F, 6, dim], from time.
            prompt: embedded prompt [N, L, dim], or this block's cached (keys, values).
            rope, layout, cache, attention_impl: see `CausalSelfAttention.forward`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table[:, None] + modulation).unbind(2)
        attended = self.attn1(
            adaln_modulate(x, shift1, scale1, eps=self.eps), rope, layout=layout, cache=cache, impl=attention_impl
        )
        x = gated_residual(x, attended, gate1)
        keys_values = prompt if isinstance(prompt, tuple) else self.attn2.prompt_keys_values(prompt)
        x = x + self.attn2(self.norm2(x), keys_values)
        return gated_residual(x, self.ffn(adaln_modulate(x, shift2, scale2, eps=self.eps)), gate2)


@functools.lru_cache(maxsize=64)
def _rope(
    num_frames: int, height: int, width: int, head_dim: int, offset: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cached RoPE tables; float64 for a float64 model, float32 otherwise."""
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):
        return rope_3d_table(num_frames, height, width, head_dim, frame_offset=offset, device=device, dtype=table_dtype)


class CausalStudent(nn.Module):
    """Causal Wan velocity model; see the module docstring."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.shape = shape
        self.gradient_checkpointing = False
        patch = shape.patch_size
        self.patch_embedding = nn.Conv3d(shape.in_channels, shape.dim, kernel_size=patch, stride=patch)
        self.condition_embedder = _ConditionEmbedder(shape)
        self.blocks = nn.ModuleList([CausalBlock(shape) for _ in range(shape.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, shape.dim) / shape.dim**0.5)
        self.proj_out = nn.Linear(shape.dim, shape.out_channels * patch[0] * patch[1] * patch[2])

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in, and what everything but latents, times and velocities is computed in."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        noisy: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        *,
        clean: Tensor | None = None,
        context_noise: float = 0.0,
    ) -> Tensor:
        """Velocity of every chunk of a video in one pass.

        Args:
            noisy: [N, C, F, H, W], noised latents, any dtype: cast to the weights' inside.
            t: [N, F] in [0, 1].
            prompt_embeds: [N, L, D], L <= text_len; zero-padded to text_len.
            clean: [N, C, F, H, W]: with it, each noisy chunk is conditioned on the clean chunks before it (the
                teacher-forcing layout `[clean | noisy]`, what cached rollouts compute); without it, block-causal.
            context_noise: time of `clean`; above 0 it has been noised to it.
        Returns:
            velocity [N, C, F, H, W] in noisy's dtype.
        Raises:
            ValueError: shapes disagree with the model or with each other.
        """
        self._check(noisy, t, clean)
        n, _, frames, height, width = noisy.shape
        grid = (frames, height // self.shape.patch_size[1], width // self.shape.patch_size[2])
        rope = _rope(*grid, self.shape.head_dim, 0, noisy.device, self.dtype)
        x = self._patchify(noisy)  # [N, F * tokens_per_frame, dim]
        if clean is not None:
            x = torch.cat([self._patchify(clean), x], dim=1)
            t = torch.cat([torch.full_like(t, context_noise), t], dim=1)  # [N, 2 F]
            rope = (rope[0].repeat(2, 1), rope[1].repeat(2, 1))
        layout = BlockCausalLayout(
            num_frames=frames,
            tokens_per_frame=grid[1] * grid[2],
            chunk_frames=self.shape.chunk_frames,
            window_frames=self.shape.window_frames,
            sink_frames=self.shape.sink_frames,
            first_chunk_frames=self.shape.first_chunk_frames,
            teacher_forcing=clean is not None,
        )
        time, modulation = self.condition_embedder(t)
        prompt = self._embed_prompt(prompt_embeds)
        for block in self.blocks:
            inputs = (x, modulation, prompt, rope, layout, None, self.shape.attention_impl)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Reentrant: the non-reentrant form breaks with frozen weights under ZeRO-3 (DeepSpeed issue).
                x = checkpoint(block, *inputs, use_reentrant=True)
            else:
                x = block(*inputs)
        if clean is not None:
            x, time = x[:, x.shape[1] // 2 :], time[:, frames:]
        assert isinstance(x, Tensor)
        return self._head(x, time, n, grid).to(noisy.dtype)

    def forward_chunk(
        self, noisy: Tensor, t: Tensor, prompt: PromptKeysValues, cache: KVCache, *, frame_offset: int
    ) -> Tensor:
        """Velocity of one chunk against the cache.

        Args:
            noisy: [N, C, K, H, W]; K as given to `cache.begin_chunk`.
            t: [N, K].
            prompt: from `prompt_keys_values`.
            cache: its current slot is written.
            frame_offset: index of the chunk's first frame in the video.
        Returns:
            velocity [N, C, K, H, W] in noisy's dtype.
        """
        n, _, frames, height, width = noisy.shape
        grid = (frames, height // self.shape.patch_size[1], width // self.shape.patch_size[2])
        rope = _rope(*grid, self.shape.head_dim, frame_offset, noisy.device, self.dtype)
        x = self._patchify(noisy)
        time, modulation = self.condition_embedder(t)
        for index, block in enumerate(self.blocks):
            x = block(x, modulation, prompt[index], rope, None, (cache, index), self.shape.attention_impl)
        return self._head(x, time, n, grid).to(noisy.dtype)

    def prompt_keys_values(self, prompt_embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values of every block for prompts [N, L, D]; computed once per rollout.

        Raises:
            ValueError: the prompts do not fit the model.
        """
        prompt = self._embed_prompt(prompt_embeds)
        return [block.attn2.prompt_keys_values(prompt) for block in self.blocks if isinstance(block, CausalBlock)]

    def new_cache(self, batch: int, num_frames: int | None, size: tuple[int, int], *, device: torch.device) -> KVCache:
        """A KV cache for `batch` videos of latent height and width `size`; without an end when num_frames is None.

        Raises:
            ValueError: neither an end nor a window bounds the memory.
        """
        shape = self.shape
        return KVCache(
            num_layers=shape.num_layers,
            shape=(batch, shape.num_heads, shape.head_dim),
            tokens_per_frame=(size[0] // shape.patch_size[1]) * (size[1] // shape.patch_size[2]),
            num_frames=num_frames,
            window_frames=shape.window_frames,
            sink_frames=shape.sink_frames,
            device=device,
            dtype=self.dtype,
        )

    def _embed_prompt(self, prompt_embeds: Tensor) -> Tensor:
        length, width = self.shape.text_len, self.shape.text_dim
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[1] > length or prompt_embeds.shape[2] != width:
            raise ValueError(f"prompt_embeds must be [N, up to {length}, {width}], got {list(prompt_embeds.shape)}")
        missing = length - prompt_embeds.shape[1]
        return self.condition_embedder.text_embedder(F.pad(prompt_embeds.to(self.dtype), (0, 0, 0, missing)))

    def _patchify(self, latents: Tensor) -> Tensor:
        return self.patch_embedding(latents.to(self.dtype)).flatten(2).transpose(1, 2)

    def _head(self, x: Tensor, time: Tensor, n: int, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [N, F * tokens_per_frame, dim] to a velocity [N, C, F, H, W]."""
        shift, scale = (self.scale_shift_table[:, None] + time[:, :, None]).unbind(2)
        out = self.proj_out(adaln_modulate(x, shift, scale, eps=self.shape.eps))
        (frames, rows, columns), (pt, ph, pw) = grid, self.shape.patch_size
        out = out.view(n, frames, rows, columns, pt, ph, pw, self.shape.out_channels)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.reshape(n, self.shape.out_channels, frames * pt, rows * ph, columns * pw)

    def _check(self, noisy: Tensor, t: Tensor, clean: Tensor | None) -> None:
        shape = self.shape
        _, ph, pw = shape.patch_size
        if noisy.ndim != 5 or noisy.shape[1] != shape.in_channels or noisy.shape[3] % ph or noisy.shape[4] % pw:
            raise ValueError(
                f"latents must be [N, {shape.in_channels}, F, {ph} x rows, {pw} x columns], got {list(noisy.shape)}"
            )
        if tuple(t.shape) != (noisy.shape[0], noisy.shape[2]):
            raise ValueError(f"t must be [{noisy.shape[0]}, {noisy.shape[2]}], got {list(t.shape)}")
        if clean is not None and clean.shape != noisy.shape:
            raise ValueError(f"clean must be {list(noisy.shape)} like the noisy latents, got {list(clean.shape)}")
