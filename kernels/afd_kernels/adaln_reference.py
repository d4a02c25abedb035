"""Eager oracles of adaptive LayerNorm modulation and gated residual."""

import torch
from torch import Tensor

from afd_kernels.dispatch import accumulation_dtype


def adaln_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Return [B, N, D]; arguments as checked by `adaln_modulate`."""
    dtype = accumulation_dtype(x.dtype)
    normed = torch.nn.functional.layer_norm(x.to(dtype), (x.shape[-1],), eps=eps)
    frames = _split_frames(normed, scale)  # [B, F, tokens, D]
    shift, scale = shift.to(dtype)[:, :, None], scale.to(dtype)[:, :, None]
    return torch.addcmul(shift, frames, 1 + scale).reshape(x.shape).to(x.dtype)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return [B, N, D]; arguments as checked by `gated_residual`."""
    dtype = accumulation_dtype(x.dtype)
    frames = torch.addcmul(
        _split_frames(x.to(dtype), gate), _split_frames(y.to(dtype), gate), gate.to(dtype)[:, :, None]
    )
    return frames.reshape(x.shape).to(x.dtype)


def _split_frames(x: Tensor, modulation: Tensor) -> Tensor:
    return x.reshape(x.shape[0], modulation.shape[1], -1, x.shape[-1])
