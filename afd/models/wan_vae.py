"""Wan's video autoencoder (diffusers' AutoencoderKLWan) behind the codec protocol: whole clips, chunks, tiles.

The decoder is causal in time, so a stream is decoded frame by frame with the features that its convolutions still need
from the frames before: `WanDecoder` holds them, and a clip decoded chunk by chunk equals the clip decoded at once.
Knows latents and pixels, no student and no prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.models.model_files import check_weights, config_of

_CLASS = "AutoencoderKLWan"


def vae_folder(path: Path) -> Path:
    """The VAE's own folder, given it or a diffusers pipeline that holds it as `vae`."""
    return path / "vae" if (path / "model_index.json").is_file() else path


def read_vae_config(path: Path) -> dict[str, Any]:
    """The VAE's config.json, checked to be complete; nothing is loaded.

    Raises:
        ValueError: the folder, its config or its weights are missing, it is another class, or it lacks the latents'
            normalisation.
    """
    folder = vae_folder(path)
    config = config_of(folder, owner="encoders.vae_path")
    if config.get("_class_name") != _CLASS:
        raise ValueError(f"encoders.vae_path {folder} must hold an {_CLASS}, got {config.get('_class_name')!r}")
    channels = config.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if not isinstance(values, list) or len(values) != channels:
            got = "none" if values is None else json.dumps(values)[:80]
            raise ValueError(f"{folder / 'config.json'} must give {name} for each of z_dim = {channels}, got {got}")
    check_weights(folder, owner="encoders.vae_path")
    return config


class WanVAE:
    """AutoencoderKLWan with its own latent normalisation, frame-major pixels in and out.

    `z = (mode - latents_mean) / latents_std`, both constants [C] from the VAE's config.json.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
    ) -> None:
        """Load from a diffusers folder (config.json + safetensors), or a pipeline's folder.

        Args:
            folder: see `vae_folder`.
            device: where it runs.
            dtype: of weights and features; Wan's own pipelines use float32.
            tile: pixels of a tile's side; larger frames go through in overlapping tiles, which bounds the memory. None
                takes frames whole.
        Raises:
            ValueError: the folder holds no complete VAE, or the tile is no multiple of 4 strides.
        """
        config = read_vae_config(folder)
        self.num_channels: int = config["z_dim"]
        self.spatial_stride: int = config.get("scale_factor_spatial", 8)
        self.temporal_stride: int = config.get("scale_factor_temporal", 4)
        self.name = f"wan-vae-{vae_folder(folder).name}"
        if tile is not None and (tile <= 0 or tile % (4 * self.spatial_stride)):
            raise ValueError(f"encoders.vae_tile must be a multiple of {4 * self.spatial_stride} pixels, got {tile}")
        from diffusers import AutoencoderKLWan

        vae: Any = AutoencoderKLWan.from_pretrained(vae_folder(folder), torch_dtype=dtype)
        self._vae = vae.eval().requires_grad_(False).to(device)
        self._tile = None if tile is None else tile // self.spatial_stride
        if tile is not None:
            vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(config["latents_mean"], device=device, dtype=dtype).view(shape)
        self._std = torch.tensor(config["latents_std"], device=device, dtype=dtype).view(shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 1 + 4 n, height, width, 3] in [0, 1] to latents [B, C, 1 + n, height / 8, width / 8] float32.

        Strides 4 and 8 are the VAE's own (`temporal_stride`, `spatial_stride`).

        Raises:
            ValueError: the frames do not divide.
        """
        frames, height, width = video.shape[1:4]
        if (frames - 1) % self.temporal_stride or height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(
                f"video must have 1 + {self.temporal_stride} n frames with sides divisible by {self.spatial_stride}, "
                f"got {frames} frames of {height} x {width}"
            )
        pixels = (video.permute(0, 4, 1, 2, 3) * 2 - 1).to(self._mean)
        modes = [self._vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]
        return ((torch.cat(modes) - self._mean) / self._std).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1 + n, H, W] to pixels [B, 1 + 4 n, 8 H, 8 W, 3] in [0, 1] float32, one clip at a time."""
        return torch.cat([self.new_decoder().decode(clip) for clip in latents.split(1)])

    def new_decoder(self) -> WanDecoder:
        """A decoder for one stream, at its beginning."""
        return WanDecoder(self._vae, self._mean, self._std, tile=self._tile)

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Frames of the video that so many latent frames decode to."""
        return 1 + self.temporal_stride * (num_latent_frames - 1)


class WanDecoder:
    """Decodes one stream of latents, any number of frames at a time; features between calls are bounded.

    Tiles overlap by a quarter and are blended linearly, as `AutoencoderKLWan.tiled_decode` blends them (the procedure;
    Source: diffusers src/diffusers/models/autoencoders/autoencoder_kl_wan.py).
    """

    def __init__(self, vae: Any, mean: Tensor, std: Tensor, *, tile: int | None) -> None:
        """Start a stream.

        Args:
            vae: AutoencoderKLWan.
            mean, std: [1, C, 1, 1, 1], the latents' normalisation.
            tile: latent rows and columns of a tile, divisible by 4; None decodes frames whole.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

        self._vae, self._mean, self._std = vae, mean, std
        self._tile = tile
        self._unpatchify = unpatchify
        self._num_convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._features: dict[tuple[int, int], list[Any]] = {}  # by a tile's first row and column

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next frames: latents [B, C, K, H, W] to pixels [B, frames, 8 H, 8 W, 3] in [0, 1] float32.

        The stream's first latent frame is one video frame, every other one is 4 (the VAE's temporal stride).
        """
        latents = latents.to(self._mean) * self._std + self._mean
        frames = torch.cat([self._frame(frame) for frame in latents.split(1, dim=2)], dim=2)
        patch = self._vae.config.patch_size
        pixels = frames if patch is None else self._unpatchify(frames, patch_size=patch)
        return (pixels.float().permute(0, 2, 3, 4, 1) / 2 + 0.5).clamp(0, 1)

    def _frame(self, latent: Tensor) -> Tensor:
        """One latent frame [B, C, 1, H, W] to the decoder's output [B, 3 patch^2, 1 or 4, rows, columns]."""
        height, width = latent.shape[3:]
        if self._tile is None or max(height, width) <= self._tile:
            return self._decode_tile(latent, (0, 0))
        step = self._tile * 3 // 4
        scale = self._vae.config.scale_factor_spatial // (self._vae.config.patch_size or 1)
        overlap, rows, above = (self._tile - step) * scale, [], []
        for top in range(0, height, step):
            row: list[Tensor] = []
            for index, left in enumerate(range(0, width, step)):
                tile = self._decode_tile(latent[..., top : top + self._tile, left : left + self._tile], (top, left))
                tile = _blend(above[index], tile, overlap, dim=3) if above else tile
                row.append(_blend(row[-1], tile, overlap, dim=4) if row else tile)
            rows.append(torch.cat([tile[..., : step * scale, : step * scale] for tile in row], dim=4))
            above = row
        return torch.cat(rows, dim=3)[..., : height * scale, : width * scale]

    def _decode_tile(self, latent: Tensor, place: tuple[int, int]) -> Tensor:
        first = place not in self._features
        features = self._features.setdefault(place, [None] * self._num_convolutions)
        inputs = self._vae.post_quant_conv(latent)
        return self._vae.decoder(inputs, feat_cache=features, feat_idx=[0], first_chunk=first)


def _blend(before: Tensor, tile: Tensor, overlap: int, *, dim: int) -> Tensor:
    """Fade from the end of the tile before into the beginning of this one over `overlap` pixels along dim."""
    overlap = min(before.shape[dim], tile.shape[dim], overlap)
    ramp = torch.arange(overlap, device=tile.device, dtype=tile.dtype) / overlap
    ramp = ramp.view([-1 if axis == dim else 1 for axis in range(tile.ndim)])
    end = before.narrow(dim, before.shape[dim] - overlap, overlap)
    start, rest = tile.split([overlap, tile.shape[dim] - overlap], dim=dim)
    return torch.cat([end * (1 - ramp) + start * ramp, rest], dim=dim)
