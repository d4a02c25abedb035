"""Samples a causal Wan student chunk by chunk with diffusers alone; copied as pipeline.py into every exported folder.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)  # this file
    video = pipe("a red ball falls", height=480, width=832, num_frames=81).frames

Needs torch and diffusers. Per chunk: predict x0 at each time of the grid, re-noise it with fresh noise to the next,
then run the clean chunk once more to cache its keys and values. Chunk length, window, sink and times are in
model_index.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

_Cache = list[tuple[Tensor, Tensor]]


@dataclass
class CausalWanOutput(BaseOutput):
    """`frames`: [N, F, H, W, 3] in [0, 1] (numpy or torch), or latents [N, C, F, H, W]."""

    frames: Any


class CausalWanPipeline(DiffusionPipeline):
    """Text to video, one chunk of latent frames after the other."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers reads the class attribute)

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        """Keep the components; `sampling` is model_index.json's."""
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(sampling=sampling)

    @property
    def _sampling(self) -> dict[str, Any]:
        config: Any = self.config
        return config.sampling

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        latent_size: tuple[int, int, int] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        output_type: str = "np",
    ) -> CausalWanOutput:
        """Generate videos.

        Args:
            prompt: one or several; needs the text encoder.
            prompt_embeds: [N, L, D] in its place.
            height, width, num_frames: of the video in pixels and frames; read by the VAE's strides.
            latent_size: (F, H, W) in their place.
            generator: of the noise.
            noise: [N, S, C, F, H, W] in its place.
            output_type: "np", "pt", or "latent".
        Raises:
            ValueError: a component is missing, or the video does not divide into chunks or patches.
        """
        embeds = self._embeds(prompt, prompt_embeds)
        if noise is None:
            frames, rows, columns = latent_size or self._latent_size(num_frames, height, width)
            channels = self.transformer.config.out_channels
            size = (len(embeds), self.num_noises, channels, frames, rows, columns)
            device = generator.device if generator is not None else self._execution_device
            noise = torch.randn(size, generator=generator, device=device)
        latents = torch.cat(list(self.chunks(embeds, noise)), dim=2)
        if output_type == "latent":
            return CausalWanOutput(frames=latents)
        video = self._decode(latents)
        return CausalWanOutput(frames=video.cpu().numpy() if output_type == "np" else video)

    @property
    def num_noises(self) -> int:
        """Noise tensors S per chunk."""
        sampling = self._sampling
        steps = max(len(sampling["steps"]), len(sampling["first_chunk_steps"] or ()))
        return steps + (sampling["context_noise"] > 0)

    @torch.no_grad()
    def chunks(self, prompt_embeds: Tensor, noise: Tensor) -> Iterator[Tensor]:
        """Latents [N, C, K, H, W] of one chunk after the other, as they are finished.

        Args:
            prompt_embeds: [N, L, D].
            noise: [N, S, C, F, H, W]; step s of a chunk reads noise[:, s, :, its frames]; context noise is the last.
        """
        sampling, device = self._sampling, self._execution_device
        noise = noise.to(device)
        spans = self._spans(noise.shape[3])
        text = self._text_tokens(prompt_embeds.to(device))
        caches: list[_Cache] = [[] for _ in self.transformer.blocks]
        kept: list[int] = []  # the video's frames in the caches
        for index, (start, end) in enumerate(spans):
            times = _grid(sampling["first_chunk_steps"] if index == 0 else None, sampling)
            eps = noise[:, :, :, start:end]
            x_t = x0 = eps[:, 0]
            for step, t in enumerate(times):
                velocity, _ = self._velocity(x_t, t, text, caches, start)
                x0 = x_t - t * velocity
                if step + 1 < len(times):
                    x_t = (1 - times[step + 1]) * x0 + times[step + 1] * eps[:, step + 1]
            yield x0
            if end == noise.shape[3]:
                return
            t = sampling["context_noise"]
            context = (1 - t) * x0 + t * eps[:, self.num_noises - 1] if t else x0
            _, fresh = self._velocity(context, t, text, caches, start)
            kept = self._remember(caches, fresh, [*kept, *range(start, end)], spans[index + 1][1])

    def _spans(self, num_frames: int) -> list[tuple[int, int]]:
        """Frames [start, end) of every chunk."""
        size = self._sampling["chunk_frames"]
        first = self._sampling["first_chunk_frames"] or size
        if num_frames < first or (num_frames - first) % size:
            raise ValueError(f"latent frames must be {first} + a multiple of {size}, got {num_frames}")
        starts = [0, *range(first, num_frames, size)]
        return list(zip(starts, [*starts[1:], num_frames], strict=True))

    def _remember(
        self, caches: list[_Cache], fresh: list[tuple[Tensor, Tensor]], frames: list[int], end: int
    ) -> list[int]:
        """Put a finished chunk's keys and values into the caches; drop what the chunk up to `end` may not see."""
        window, sink = self._sampling["window_frames"], self._sampling["sink_frames"]
        keep = [i for i, f in enumerate(frames) if window is None or f < sink or f >= end - window]
        for cache, new in zip(caches, fresh, strict=True):
            whole = [torch.cat(pair, dim=2) for pair in zip(cache[0], new, strict=True)] if cache else list(new)
            tokens = whole[0].shape[2] // len(frames)
            index = torch.tensor(keep, device=whole[0].device)[:, None] * tokens
            index = (index + torch.arange(tokens, device=index.device)).flatten()
            cache[:] = [(whole[0].index_select(2, index), whole[1].index_select(2, index))] if keep else []
        return [frames[i] for i in keep]

    def _velocity(self, x: Tensor, t: float, text: Tensor, caches: list[_Cache], start: int) -> tuple[Tensor, _Cache]:
        """Velocity of a chunk x [N, C, K, H, W] at time t, and each block's keys and values of it."""
        model = self.transformer
        n, _, frames, height, width = x.shape
        _, ph, pw = model.config.patch_size
        hidden = model.patch_embedding(x.to(model.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        time, modulation = self._time(t, x.device, hidden.dtype)
        rope = _rope(model.config.attention_head_dim, (frames, height // ph, width // pw), start, x.device)
        fresh: _Cache = []
        for block, cache in zip(model.blocks, caches, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + modulation.float()).chunk(6, 1)
            normed = (block.norm1(hidden.float()) * (1 + scale1) + shift1).type_as(hidden)
            attended, keys_values = _self_attention(block.attn1, normed, rope, cache)
            fresh.append(keys_values)
            hidden = (hidden.float() + attended * gate1).type_as(hidden)
            normed = block.norm2(hidden.float()).type_as(hidden)
            hidden = hidden + block.attn2(normed, text, None, None)
            normed = (block.norm3(hidden.float()) * (1 + scale2) + shift2).type_as(hidden)
            hidden = (hidden.float() + block.ffn(normed).float() * gate2).type_as(hidden)
        shift, scale = (model.scale_shift_table + time[:, None]).chunk(2, dim=1)
        hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        out = model.proj_out(hidden).view(n, frames, height // ph, width // pw, ph, pw, -1)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(n, -1, frames, height, width).to(x.dtype), fresh

    def _time(self, t: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Time embedding [1, dim] and the blocks' modulation [1, 6, dim]."""
        embedder = self.transformer.condition_embedder
        if self._sampling.get("numerics") == "diffusers":
            sinusoid = embedder.timesteps_proj(torch.tensor([1000 * t], device=device))
        else:
            half = self.transformer.config.freq_dim // 2
            powers = torch.arange(half, dtype=torch.float64, device=device) / half
            angles = 1000 * t * torch.pow(10000.0, -powers)[None]
            sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        weights = next(embedder.time_embedder.parameters())
        time = embedder.time_embedder(sinusoid.to(weights.dtype)).to(dtype)
        return time, embedder.time_proj(embedder.act_fn(time)).unflatten(1, (6, -1))

    def _text_tokens(self, prompt_embeds: Tensor) -> Tensor:
        """The embedded prompt, zero-padded to the student's text length before."""
        embedder = self.transformer.condition_embedder.text_embedder
        missing = self._sampling["text_len"] - prompt_embeds.shape[1]
        if missing < 0:
            raise ValueError(f"prompt_embeds must have at most {self._sampling['text_len']} tokens")
        return embedder(F.pad(prompt_embeds.to(embedder.linear_1.weight.dtype), (0, 0, 0, missing)))

    def _embeds(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> Tensor:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give one of prompt and prompt_embeds")
        if prompt_embeds is not None:
            return prompt_embeds
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this folder has no text encoder: give prompt_embeds, or export with --components")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        length = self._sampling["text_len"]
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(self._execution_device)
        hidden = self.text_encoder(tokens.input_ids.to(mask.device), mask).last_hidden_state
        return hidden * mask[..., None]

    def _latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        if self.vae is None:
            raise ValueError("this folder has no VAE: give latent_size or noise, or export with --components")
        time_stride, stride = self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial
        _, ph, pw = self.transformer.config.patch_size
        if (num_frames - 1) % time_stride or height % (stride * ph) or width % (stride * pw):
            raise ValueError(
                f"num_frames must be 1 + a multiple of {time_stride}, height and width multiples of {stride * ph} and "
                f"{stride * pw}, got {num_frames}, {height} x {width}"
            )
        return (num_frames - 1) // time_stride + 1, height // stride, width // stride

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to frames [N, F, H, W, 3] in [0, 1]."""
        if self.vae is None:
            raise ValueError('this folder has no VAE: take output_type="latent", or export with --components')
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(v).view(shape).to(latents) for v in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        video = self.vae.decode((latents * std + mean).to(self.vae.dtype)).sample
        return (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def _grid(steps: list[int] | None, sampling: dict[str, Any]) -> list[float]:
    """Times in (0, 1]: s / 1000 warped by shift s' = shift s / (1 + (shift - 1) s)."""
    shift = sampling["shift"]
    return [shift * s / 1000 / (1 + (shift - 1) * s / 1000) for s in steps or sampling["steps"]]


def _rope(head_dim: int, grid: tuple[int, int, int], start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [tokens, head_dim / 2] in float64 of a chunk whose first frame is `start`."""
    axis_dim = 2 * (head_dim // 6)
    angles = []
    for axis, (size, first, dim) in enumerate(
        ((grid[0], start, head_dim - 2 * axis_dim), (grid[1], 0, axis_dim), (grid[2], 0, axis_dim))
    ):
        position = torch.arange(first, first + size, dtype=torch.float64, device=device)
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / max(dim, 1))
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(torch.outer(position, frequency).view(shape).expand(*grid, dim // 2))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos(), angle.sin()


def _self_attention(
    attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], cache: _Cache
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attend from a chunk to what is cached and to itself; the chunk's own keys and values come back too."""

    def heads(each: Tensor) -> Tensor:
        return each.unflatten(2, (attention.heads, -1)).transpose(1, 2)

    def rotate(each: Tensor) -> Tensor:
        even, odd = each.double().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(each.dtype)

    q, k = rotate(heads(attention.norm_q(attention.to_q(x)))), rotate(heads(attention.norm_k(attention.to_k(x))))
    v = heads(attention.to_v(x))
    keys = torch.cat([cache[0][0], k], dim=2) if cache else k
    values = torch.cat([cache[0][1], v], dim=2) if cache else v
    out = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](out.to(x.dtype))), (k, v)
