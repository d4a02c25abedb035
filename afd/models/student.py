"""The causal Wan-architecture student: chunk-wise autoregressive velocity model with diffusers' parameter names.

One module for every size: the quick start's 0.3 M parameters and Wan 1.3B or 14B differ in `StudentShape` only.
`forward` is the training pass over a whole video (block-causal, or the teacher-forcing layout `[clean | noisy]`);
`forward_chunk` is the same function for one chunk against a KV cache. Sampling loops live in `afd.rollout`.
Source of the numerics: Wan-Video/Wan2.1 wan/modules/model.py and diffusers transformer_wan.py (names).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afd.config import StudentShape
from afd.models.attention import CausalSelfAttention, CrossAttention
from afd.models.compiled import CompileMode, block_step
from afd.models.conditioning import ConditionEmbedder, FeedForward, ImageCondition
from afd.models.kv_cache import KVCache, LayerCache
from afd.models.three_velocities import LaggingPass
from afd_kernels import BlockCausalLayout, adaln_modulate, gated_residual, rope_3d_table

PromptKeysValues = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class EmbeddedVideo:
    """What the blocks and the head need of a whole video; made by `CausalStudent.embed`.

    Attributes:
        tokens: [N, F * tokens_per_frame, dim], or twice as many: `[clean | noisy]`.
        time: [N, F, dim] of the noisy frames, for the head.
        modulation: [N, F or 2 F, 6, dim], for the blocks.
        prompt: [N, text_len (+ image tokens), dim].
        rope: cos, sin [tokens, head_dim / 2].
        layout: who sees whom.
        grid: frames, rows and columns of tokens.
    """

    tokens: Tensor
    time: Tensor
    modulation: Tensor
    prompt: Tensor
    rope: tuple[Tensor, Tensor]
    layout: BlockCausalLayout
    grid: tuple[int, int, int]


class CausalBlock(nn.Module):
    """One Wan transformer block with per-frame modulation. ZeRO-3 gathers it as a whole (a leaf module)."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        dim, eps = shape.dim, shape.eps
        self.eps = eps
        image_after = None if shape.image_dim is None else shape.text_len
        self.attn1 = CausalSelfAttention(dim, shape.num_heads, eps, shape.numerics)
        self.attn2 = CrossAttention(dim, shape.num_heads, eps, shape.numerics, image_after=image_after)
        self.norm2 = nn.LayerNorm(dim, eps) if shape.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, shape.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        prompt: Tensor | tuple[Tensor, ...],
        rope: tuple[Tensor, Tensor],
        layout: BlockCausalLayout | None,
        cache: LayerCache | None,
        attention_impl: str | None,
        lagging: LaggingPass | None = None,
    ) -> Tensor:
        """Transform tokens x [N, tokens, dim].

        Args:
            modulation: [N, F, 6, dim], from time.
            prompt: embedded prompt [N, L, dim], or this block's cached (keys, values).
            rope, layout, cache, attention_impl: see `CausalSelfAttention.forward`.
            lagging: other roles' passes, which go through while this block's weights are whole.
        """
        if lagging is not None:
            lagging.advance(self, modulation, prompt, rope, layout, cache, attention_impl)
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
    """Cached RoPE tables."""
    with torch.inference_mode(False):
        return rope_3d_table(num_frames, height, width, head_dim, frame_offset=offset, device=device, dtype=dtype)


class CausalStudent(nn.Module):
    """Causal Wan velocity model; see the module docstring."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.shape = shape
        self.gradient_checkpointing = False
        self.rollout_compile: CompileMode = "none"
        patch = shape.patch_size
        self.patch_embedding = nn.Conv3d(shape.in_channels, shape.dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(shape)
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
        image: ImageCondition | None = None,
        lagging: LaggingPass | None = None,
    ) -> Tensor:
        """Velocity of every chunk of a video in one pass.

        Args:
            noisy: [N, C, F, H, W], noised latents, any dtype: cast to the weights' inside. An image-to-video student
                also takes them with the condition's channels behind them, [N, in_channels, F, H, W].
            t: [N, F] in [0, 1].
            prompt_embeds: [N, L, D], L <= text_len; zero-padded to text_len.
            clean: [N, C, F, H, W]: with it, each noisy chunk is conditioned on the clean chunks before it (the
                teacher-forcing layout `[clean | noisy]`, what cached rollouts compute); without it, block-causal.
                A video of one chunk (chunk_frames = F) without it is the full attention of a bidirectional model.
            context_noise: time of `clean`; above 0 it has been noised to it.
            image: what an image-to-video student is given of its image.
            lagging: other roles' passes to compute beside this one; a student with adapters only.
        Returns:
            velocity [N, C, F, H, W] in noisy's dtype.
        Raises:
            ValueError: shapes disagree with the model or with each other.
        """
        video = self.embed(noisy, t, prompt_embeds, clean=clean, context_noise=context_noise, image=image)
        x = video.tokens
        if lagging is not None:
            lagging.start(x)
        common = (video.modulation, video.prompt, video.rope, video.layout, None, self.shape.attention_impl)
        for block in self.blocks:
            inputs = (x, *common, lagging)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Reentrant: the non-reentrant form breaks with frozen weights under ZeRO-3 (DeepSpeed issue).
                x = checkpoint(block, *inputs, use_reentrant=True)
            else:
                x = block(*inputs)
        assert isinstance(x, Tensor)
        if lagging is None:
            return self.head(x, video).to(noisy.dtype)
        noisy_half, time = x[:, -video.layout.video_tokens :], video.time.repeat(1 + len(lagging.roles), 1, 1)
        return lagging.split(self.head(lagging.beside(noisy_half), replace(video, time=time)).to(noisy.dtype))

    def embed(
        self,
        noisy: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        *,
        clean: Tensor | None = None,
        context_noise: float = 0.0,
        image: ImageCondition | None = None,
    ) -> EmbeddedVideo:
        """Everything before the blocks; arguments as for `forward`.

        Raises:
            ValueError: shapes disagree with the model or with each other.
        """
        image = image or ImageCondition()
        self._check(noisy, t, clean)
        frames = noisy.shape[2]
        grid = self._grid(noisy)
        rope = self._rope(grid, 0, noisy)
        x = self._patchify(self._with_condition(noisy, image))  # [N, F * tokens_per_frame, dim]
        t_all = t
        if clean is not None:
            x = torch.cat([self._patchify(self._with_condition(clean, image)), x], dim=1)
            t_all = torch.cat([torch.full_like(t, context_noise), t], dim=1)  # [N, 2 F]
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
        time, modulation = self.condition_embedder(t_all)
        prompt = self.condition_embedder.embed_prompt(prompt_embeds, image.embeds, self.shape.text_len)
        return EmbeddedVideo(x, time[:, -frames:], modulation, prompt, rope, layout, grid)

    def head(self, x: Tensor, video: EmbeddedVideo) -> Tensor:
        """The last block's tokens, of which the noisy half counts, to a velocity [N, C, F, H, W]."""
        frames, rows, columns = video.grid
        return self._head(x[:, -frames * rows * columns :], video.time, video.grid)

    def forward_chunk(
        self,
        noisy: Tensor,
        t: Tensor,
        prompt: PromptKeysValues,
        cache: KVCache,
        *,
        frame_offset: int,
        image: ImageCondition | None = None,
    ) -> Tensor:
        """Velocity of one chunk against the cache.

        Args:
            noisy: [N, C, K, H, W]; K as given to `cache.begin_chunk`.
            t: [N, K].
            prompt: from `prompt_keys_values`.
            cache: its current slot is written.
            frame_offset: index of the chunk's first frame in the video.
            image: the chunk's part (`ImageCondition.frames`) of an image-to-video student's condition.
        Returns:
            velocity [N, C, K, H, W] in noisy's dtype.
        """
        grid = self._grid(noisy)
        rope = self._rope(grid, frame_offset, noisy)
        x = self._patchify(self._with_condition(noisy, image or ImageCondition()))
        time, modulation = self.condition_embedder(t)
        step = block_step(self.rollout_compile)
        for index, block in enumerate(self.blocks):
            x = step(block, x, modulation, prompt[index], rope, LayerCache(cache, index), self.shape.attention_impl)
        return self._head(x, time, grid).to(noisy.dtype)

    def prompt_keys_values(self, prompt_embeds: Tensor, *, image: ImageCondition | None = None) -> PromptKeysValues:
        """Cross-attention keys and values of every block for prompts [N, L, D]; computed once per rollout.

        Raises:
            ValueError: the prompts, or the image's embeddings, do not fit the model.
        """
        embeds = None if image is None else image.embeds
        prompt = self.condition_embedder.embed_prompt(prompt_embeds, embeds, self.shape.text_len)
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

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        frames, height, width = latents.shape[2:]
        return frames, height // self.shape.patch_size[1], width // self.shape.patch_size[2]

    def _rope(self, grid: tuple[int, int, int], offset: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for a token grid: float64 where the numerics or the model are, else float32."""
        is_wide = self.shape.numerics == "wan_float64" or self.dtype == torch.float64
        dtype = torch.float64 if is_wide and self.shape.numerics != "diffusers" else torch.float32
        return _rope(*grid, self.shape.head_dim, offset, latents.device, dtype)

    def _with_condition(self, latents: Tensor, image: ImageCondition) -> Tensor:
        """Latents [N, C, F, H, W] with the image's channels behind them: [N, in_channels, F, H, W]."""
        wanted = self.shape.condition_channels
        if image.latents is None and latents.shape[1] == self.shape.in_channels:
            return latents
        expected = [latents.shape[0], wanted, *latents.shape[2:]]
        if image.latents is None or list(image.latents.shape) != expected or not wanted:
            got = None if image.latents is None else list(image.latents.shape)
            raise ValueError(f"image.latents must be {expected if wanted else None} for this student, got {got}")
        return torch.cat([latents, image.latents.to(latents.dtype)], dim=1)

    def _patchify(self, latents: Tensor) -> Tensor:
        return self.patch_embedding(latents.to(self.dtype)).flatten(2).transpose(1, 2)

    def _head(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [N, F * tokens_per_frame, dim] to a velocity [N, C, F, H, W]."""
        shift, scale = (self.scale_shift_table[:, None] + time[:, :, None]).unbind(2)
        out = self.proj_out(adaln_modulate(x, shift, scale, eps=self.shape.eps))
        (frames, rows, columns), (pt, ph, pw) = grid, self.shape.patch_size
        n = out.shape[0]
        out = out.view(n, frames, rows, columns, pt, ph, pw, self.shape.out_channels)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.reshape(n, self.shape.out_channels, frames * pt, rows * ph, columns * pw)

    def _check(self, noisy: Tensor, t: Tensor, clean: Tensor | None) -> None:
        shape = self.shape
        _, ph, pw = shape.patch_size
        channels = (shape.out_channels, shape.in_channels)
        if noisy.ndim != 5 or noisy.shape[1] not in channels or noisy.shape[3] % ph or noisy.shape[4] % pw:
            raise ValueError(
                f"latents must be [N, {shape.out_channels}, F, {ph} x rows, {pw} x columns], got {list(noisy.shape)}"
            )
        if tuple(t.shape) != (noisy.shape[0], noisy.shape[2]):
            raise ValueError(f"t must be [{noisy.shape[0]}, {noisy.shape[2]}], got {list(t.shape)}")
        if clean is not None and clean.shape != noisy.shape:
            raise ValueError(f"clean must be {list(noisy.shape)} like the noisy latents, got {list(clean.shape)}")
