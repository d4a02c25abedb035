"""The quick start's codec: a fixed, weight-free block transform in the place of a video VAE.

Each frame is cut into 4 x 4 blocks; each block of Y, Cb, Cr goes through an orthonormal 2-D DCT and only the lowest
frequencies are kept (6 of Y, 3 of Cb, 3 of Cr). It compresses 48 numbers to 12 and is lossy like a VAE, yet has no
weights, so the built-in world needs no download. Real runs use `WanVAE` with the same methods.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 4
NUM_CHANNELS = 12
_LUMA_KEPT = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
_CHROMA_KEPT = ((0, 0), (0, 1), (1, 0))
# ITU-R BT.601 luma/chroma analysis matrix, rows Y, Cb, Cr.
_RGB_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


def _basis() -> tuple[Tensor, Tensor]:
    """Analysis and synthesis matrices between a 4 x 4 RGB block (48) and its kept coefficients (12), float64."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    dct = torch.cos(math.pi * (2 * n[None, :] + 1) * n[:, None] / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    dct[0] /= math.sqrt(2)  # [frequency, pixel], orthonormal
    ycc = torch.tensor(_RGB_TO_YCC, dtype=torch.float64)
    rgb = torch.linalg.inv(ycc)
    kept = [(0, uv) for uv in _LUMA_KEPT] + [(1, uv) for uv in _CHROMA_KEPT] + [(2, uv) for uv in _CHROMA_KEPT]
    analysis, synthesis = [], []
    for plane, (u, v) in kept:
        pattern = torch.outer(dct[u], dct[v])  # [4, 4]
        analysis.append((ycc[plane][:, None, None] * pattern).flatten())  # over (rgb, row, column)
        synthesis.append((rgb[:, plane][:, None, None] * pattern).flatten())
    return torch.stack(analysis), torch.stack(synthesis)  # [12, 48] each


class DCTCodec:
    """Block-DCT video codec: `[B, F, H*4, W*4, 3]` pixels in [0, 1] to `[B, 12, F, H, W]` latents and back."""

    num_channels = NUM_CHANNELS
    spatial_stride = BLOCK
    temporal_stride = 1
    name = "dct-4x4-ycc-6-3-3"

    def __init__(self, *, mean: float = 0.08, scale: float = 0.35) -> None:
        """Latents are divided by `scale` per coefficient after the mean grey level `mean` is taken off the DC."""
        analysis, synthesis = _basis()
        self._analysis = analysis.float()
        self._synthesis = synthesis.float()
        self._mean = mean
        self._scale = scale

    def encode(self, video: Tensor) -> Tensor:
        """Encode pixels.

        Args:
            video: [B, F, height, width, 3] float32 in [0, 1]; height and width divisible by 4.
        Returns:
            [B, 12, F, height / 4, width / 4] float32, about zero mean and unit-order scale.
        Raises:
            ValueError: the shape is not [B, F, height, width, 3] with sides divisible by 4.
        """
        if video.ndim != 5 or video.shape[-1] != 3 or video.shape[2] % BLOCK or video.shape[3] % BLOCK:
            raise ValueError(f"video must be [B, F, 4 * H, 4 * W, 3], got {list(video.shape)}")
        b, f, height, width, _ = video.shape
        blocks = (video - self._mean).view(b, f, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
        blocks = blocks.permute(0, 1, 2, 4, 6, 3, 5).reshape(b, f, height // BLOCK, width // BLOCK, 48)
        latents = blocks @ self._analysis.to(video).T / self._scale  # [B, F, H, W, 12]
        return latents.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 12, F, H, W] to pixels [B, F, 4 H, 4 W, 3] float32, clamped to [0, 1].

        Raises:
            ValueError: latents are not [B, 12, F, H, W].
        """
        if latents.ndim != 5 or latents.shape[1] != NUM_CHANNELS:
            raise ValueError(f"latents must be [B, {NUM_CHANNELS}, F, H, W], got {list(latents.shape)}")
        b, _, f, h, w = latents.shape
        blocks = latents.float().permute(0, 2, 3, 4, 1) @ self._synthesis.to(latents.device) * self._scale
        blocks = blocks.view(b, f, h, w, 3, BLOCK, BLOCK).permute(0, 1, 2, 5, 3, 6, 4)
        return (blocks.reshape(b, f, h * BLOCK, w * BLOCK, 3) + self._mean).clamp(0.0, 1.0)

    def new_decoder(self) -> DCTCodec:
        """A decoder for one stream: frames do not depend on each other, so this codec itself."""
        return self

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Frames of the video that so many latent frames decode to: as many."""
        return num_latent_frames
