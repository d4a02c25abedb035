"""Samples a causal Wan student chunk by chunk with diffusers alone; copied as pipeline.py into every exported folder.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)  # this file
    video = pipe("a red ball falls", height=480, width=832, num_frames=81).frames

Imported from this file, `CausalWanPipeline.from_pretrained(folder)` does without the flag, which diffusers asks for
before it runs a folder's code. Needs torch and diffusers. Per chunk: predict x0 at each time of the grid, re-noise it
with fresh noise to the next, then run the clean chunk once more to cache its keys and values. Chunk length, window,
sink and times are in model_index.json.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

_Cache = list[tuple[Tensor, Tensor]]


@dataclass
class CausalWanOutput(BaseOutput):
    """`frames`: [N, F, H, W, 3] in [0, 1] (numpy or torch), or latents [N, C, F, H, W]."""

    frames: Any


class CausalWanPipeline(DiffusionPipeline):
    """Text, or text and an image, to video, one chunk of latent frames after the other."""

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"]  # noqa: RUF012

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        image_processor: Any = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        """Keep the components; `sampling` is model_index.json's."""
        super().__init__()
        words = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        images = {"image_encoder": image_encoder, "image_processor": image_processor}
        self.register_modules(transformer=transformer, vae=vae, **words, **images)
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
        image: Any = None,
        last_image: Any = None,
        prompt_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_latents: Tensor | None = None,
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
            image: the first frame, PIL, or one per prompt; needs the VAE, and the image encoder where the student has
                an image embedder. A text-to-video student takes one when its first chunk is a single latent frame.
            last_image: the last frame too, for students with image channels.
            prompt_embeds: [N, L, D] in place of the prompt.
            image_embeds: [N, tokens, width] in place of the image encoder's tokens.
            image_latents: in place of the VAE's: [N, mask and latent channels, F, H, W], or [N, C, 1, H, W] for a
                student without image channels.
            height, width, num_frames: of the video in pixels and frames; read by the VAE's strides.
            latent_size: (F, H, W) in their place.
            generator: of the noise.
            noise: [N, S, C, F, H, W] in its place.
            output_type: "np", "pt", or "latent".
        Raises:
            ValueError: a component or the image is missing, or the video does not divide into chunks or patches.
        """
        if output_type not in ("np", "pt", "latent"):
            raise ValueError(f'output_type must be "np", "pt" or "latent", got {output_type!r}')
        if output_type != "latent" and self.vae is None:
            raise ValueError('this folder has no VAE: take output_type="latent", or export with --components')
        embeds = self._embeds(prompt, prompt_embeds)
        if noise is None:
            latent_size = latent_size or self._latent_size(num_frames, height, width)
            size = (len(embeds), self.num_noises, self.transformer.config.out_channels, *latent_size)
            device = generator.device if generator is not None else self._execution_device
            noise = torch.randn(size, generator=generator, device=device)
        images = [each for each in (image, last_image) if each is not None]
        seen = self._seen(images, image_embeds, image_latents, noise)
        latents = torch.cat(list(self.chunks(embeds, noise, *seen)), dim=2)
        frames = latents if output_type == "latent" else self._decode(latents)
        return CausalWanOutput(frames=frames.cpu().numpy() if output_type == "np" else frames)

    @property
    def num_noises(self) -> int:
        """Noise tensors S per chunk."""
        sampling = self._sampling
        steps = max(len(sampling["steps"]), len(sampling["first_chunk_steps"] or ()))
        return steps + (sampling["context_noise"] > 0)

    @torch.no_grad()
    def chunks(
        self, prompt_embeds: Tensor, noise: Tensor, latents: Tensor | None = None, tokens: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Latents [N, C, K, H, W] of one chunk after the other, as they are finished.

        Args:
            prompt_embeds: [N, L, D].
            noise: [N, S, C, F, H, W]; step s of a chunk reads noise[:, s, :, its frames]; context noise is the last.
            latents, tokens: `image_latents` of `__call__`, and the image's embedded tokens [N, I, dim].
        """
        sampling, device = self._sampling, self._execution_device
        has_channels = self.transformer.config.in_channels > self.transformer.config.out_channels
        known = None if latents is None else latents.to(device)
        noise, spans = noise.to(device), self._spans(noise.shape[3])
        text = self._prompt_keys_values(prompt_embeds.to(device), tokens)
        caches: list[_Cache] = [[] for _ in self.transformer.blocks]
        kept: list[int] = []  # the video's frames in the caches
        for index, (start, end) in enumerate(spans):
            times = _grid(sampling["first_chunk_steps"] if index == 0 else None, sampling)
            eps = noise[:, :, :, start:end]
            seen = known[:, :, start:end] if known is not None and has_channels else eps[:, 0, :0]
            x_t = x0 = eps[:, 0]
            if known is not None and not has_channels and index == 0:
                times, x0 = [], known
            for step, t in enumerate(times):
                velocity, _ = self._velocity(torch.cat([x_t, seen], dim=1), t, text, caches, start)
                x0 = x_t - t * velocity
                if step + 1 < len(times):
                    x_t = (1 - times[step + 1]) * x0 + times[step + 1] * eps[:, step + 1]
            yield x0
            if end == noise.shape[3]:
                return
            t = sampling["context_noise"]
            context = (1 - t) * x0 + t * eps[:, self.num_noises - 1] if t else x0
            _, fresh = self._velocity(torch.cat([context, seen], dim=1), t, text, caches, start)
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
            index = torch.tensor([i * tokens + j for i in keep for j in range(tokens)], device=whole[0].device)
            cache[:] = [(whole[0].index_select(2, index), whole[1].index_select(2, index))] if keep else []
        return [frames[i] for i in keep]

    def _velocity(
        self, x: Tensor, t: float, prompt: list[tuple[Tensor, ...]], caches: list[_Cache], start: int
    ) -> tuple[Tensor, _Cache]:
        """Velocity of a chunk x [N, in_channels, K, H, W] at time t, and each block's keys and values of it."""
        model = self.transformer
        n, _, frames, height, width = x.shape
        _, ph, pw = model.config.patch_size
        hidden = model.patch_embedding(x.to(model.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        time, modulation = self._time(t, x.device, hidden.dtype)
        rope = _rope(model.config.attention_head_dim, (frames, height // ph, width // pw), start, x.device)
        fresh: _Cache = []
        for block, cache, keys_values in zip(model.blocks, caches, prompt, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + modulation.float()).chunk(6, 1)
            normed = (block.norm1(hidden.float()) * (1 + scale1) + shift1).type_as(hidden)
            attended, own = _self_attention(block.attn1, normed, rope, cache)
            fresh.append(own)
            hidden = (hidden.float() + attended * gate1).type_as(hidden)
            normed = block.norm2(hidden.float()).type_as(hidden)
            hidden = hidden + _cross_attention(block.attn2, normed, keys_values)
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

    def _prompt_keys_values(self, prompt_embeds: Tensor, image: Tensor | None) -> list[tuple[Tensor, ...]]:
        """Every block's cross-attention keys and values of the zero-padded prompt, and of the image's tokens."""
        embedder, length = self.transformer.condition_embedder.text_embedder, self._sampling["text_len"]
        if prompt_embeds.shape[1] > length:
            raise ValueError(f"prompt_embeds must have at most {length} tokens, got {prompt_embeds.shape[1]}")
        padding = (0, 0, 0, length - prompt_embeds.shape[1])
        text = embedder(F.pad(prompt_embeds.to(embedder.linear_1.weight.dtype), padding))
        every: list[tuple[Tensor, ...]] = []
        for attention in (block.attn2 for block in self.transformer.blocks):
            each = (attention.norm_k(attention.to_k(text)), attention.to_v(text))
            if image is not None:
                each += (attention.norm_added_k(attention.add_k_proj(image)), attention.add_v_proj(image))
            every.append(tuple(_heads(attention, tensor) for tensor in each))
        return every

    def _seen(
        self, images: Sequence[Any], embeds: Tensor | None, latents: Tensor | None, noise: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Latents and embedded tokens of the images, as `chunks` takes them; what does not fit is refused."""
        config, (count, _, channels, frames, rows, columns) = self.transformer.config, noise.shape
        extra, width = config.in_channels - config.out_channels, config.image_dim
        if not extra and width is None:
            if not images and embeds is None and latents is None:
                return None, None
            if self._spans(frames)[0] != (0, 1) or embeds is not None or len(images) > 1:
                raise ValueError("a text-to-video student takes one image, and only if its first chunk is one frame")
        if images and latents is None and (extra or width is None):
            latents = self._image_latents(images, noise)
        if images and embeds is None and width is not None:
            embeds = self._image_embeds(images, count)
        if extra or width is None:
            wanted = [count, extra, frames, rows, columns] if extra else [count, channels, 1, rows, columns]
            latents = _checked("image_latents", latents, wanted)
        if width is None:
            return latents, None
        given = _checked("image_embeds", embeds, [count, 0 if embeds is None else embeds.shape[1], width])
        embedder = self.transformer.condition_embedder.image_embedder
        if embedder.pos_embed is not None:  # diffusers takes the two images' tokens as two rows
            given = given.reshape(2 * count, -1, width)
        return latents, embedder(given.to(self._execution_device, embedder.norm1.weight.dtype))

    def _image_latents(self, images: Sequence[Any], noise: Tensor) -> Tensor:
        """Mask (one channel per frame that a latent frame stands for) and latents of a video, grey but for the images.

        Source: Wan2.1 wan/image2video.py. A student without image channels gets the first frame's latents alone.
        """
        if self.vae is None:
            raise ValueError("this folder has no VAE: give image_latents, or export with --components")
        count, _, _, frames, rows, columns = noise.shape
        stride, time_stride = self.vae.config.scale_factor_spatial, self.vae.config.scale_factor_temporal
        processor, size = VideoProcessor(vae_scale_factor=stride), (rows * stride, columns * stride)
        pixels = [processor.preprocess(each, *size)[:, :, None].float() for each in images]
        if self.transformer.config.in_channels == self.transformer.config.out_channels:
            return self._normalised(pixels[0], count)
        between = pixels[0].new_zeros(len(pixels[0]), 3, time_stride * (frames - 1) + 1 - len(pixels), *size)
        latents = self._normalised(torch.cat([pixels[0], between, *pixels[1:]], dim=2), count)
        mask = latents.new_zeros(count, time_stride, frames, rows, columns)
        mask[:, :, 0] = 1
        if len(pixels) > 1:
            mask[:, -1, -1] = 1
        return torch.cat([mask, latents], dim=1)

    def _normalised(self, pixels: Tensor, count: int) -> Tensor:
        """Video [1 or N, 3, F, H, W] in [-1, 1] to N normalised latents."""
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = torch.cat([self.vae.encode(each).latent_dist.mode() for each in pixels.split(1)]).float()
        mean, std = self._latent_scale(latents)
        return ((latents - mean) / std).expand(count, -1, -1, -1, -1)

    def _latent_scale(self, latents: Tensor) -> list[Tensor]:
        constants = (self.vae.config.latents_mean, self.vae.config.latents_std)
        return [torch.tensor(each).view(1, -1, 1, 1, 1).to(latents) for each in constants]

    def _image_embeds(self, images: Sequence[Any], count: int) -> Tensor:
        """The image encoder's tokens [N, tokens, width]: its last layer but one; two images one after the other."""
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError("this folder has no image encoder: give image_embeds, or export with --components")
        pixels = [self.image_processor(images=image, return_tensors="pt").pixel_values for image in images]
        pixels = [each.to(self._execution_device, self.image_encoder.dtype) for each in pixels]
        hidden = [self.image_encoder(each, output_hidden_states=True).hidden_states[-2] for each in pixels]
        return torch.cat([each.expand(count, -1, -1) for each in hidden], dim=1)

    def _embeds(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> Tensor:
        if prompt_embeds is not None and prompt is None:
            return prompt_embeds
        if prompt is None or prompt_embeds is not None:
            raise ValueError("give one of prompt and prompt_embeds")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this folder has no text encoder: give prompt_embeds, or export with --components")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [" ".join(html.unescape(html.unescape(each)).split()) for each in prompts]
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
            wanted = f"1 + a multiple of {time_stride}, height and width multiples of {stride * ph} and {stride * pw}"
            raise ValueError(f"num_frames must be {wanted}, got {num_frames}, {height} x {width}")
        return (num_frames - 1) // time_stride + 1, height // stride, width // stride

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to frames [N, F, H, W, 3] in [0, 1]."""
        mean, std = self._latent_scale(latents)
        raw = (latents * std + mean).to(self.vae.dtype)
        video = torch.cat([self.vae.decode(each).sample for each in raw.split(1)])
        return (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def _checked(name: str, got: Tensor | None, shape: list[int]) -> Tensor:
    if got is None or list(got.shape) != shape:
        wanted = str(shape).replace(", 0,", ", tokens,")
        raise ValueError(f"give an image, or {name} {wanted}, got {None if got is None else list(got.shape)}")
    return got


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


def _heads(attention: Any, each: Tensor) -> Tensor:
    """[N, tokens, dim] -> [N, heads, tokens, head_dim]."""
    return each.unflatten(2, (attention.heads, -1)).transpose(1, 2)


def _cross_attention(attention: Any, x: Tensor, keys_values: tuple[Tensor, ...]) -> Tensor:
    """Attend to the prompt, and to the image with keys and values of its own; the two are added."""
    q = _heads(attention, attention.norm_q(attention.to_q(x)))
    out = F.scaled_dot_product_attention(q, keys_values[0], keys_values[1])
    if len(keys_values) > 2:
        out = out + F.scaled_dot_product_attention(q, keys_values[2], keys_values[3])
    return attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype)))


def _self_attention(
    attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], cache: _Cache
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attend from a chunk to what is cached and to itself; the chunk's own keys and values come back too."""

    def rotate(each: Tensor) -> Tensor:
        even, odd = each.double().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(each.dtype)

    q, k = (
        rotate(_heads(attention, norm(project(x))))
        for norm, project in ((attention.norm_q, attention.to_q), (attention.norm_k, attention.to_k))
    )
    v = _heads(attention, attention.to_v(x))
    keys = torch.cat([cache[0][0], k], dim=2) if cache else k
    values = torch.cat([cache[0][1], v], dim=2) if cache else v
    out = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](out.to(x.dtype))), (k, v)
