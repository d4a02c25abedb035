"""Eager oracle of RMSNorm + 3-D RoPE, and the table of its angles."""

import torch
from torch import Tensor

from afd_kernels.dispatch import accumulation_dtype


def rope_3d_table(
    num_frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    frame_offset: int = 0,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 3-D rotary angles; angles in float64, cast at the end.

    head_dim is split into t | h | w with h = w = 2 (head_dim // 6) and t the rest (128: 44 | 42 | 42); pair i of an
    axis of size d turns by position * theta^(-2 i / d) radians.

    Args:
        num_frames, height, width: token grid after patching; tokens are frame-major, then rows, then columns.
        head_dim: even.
        frame_offset: position of the first frame (rollouts).
        theta: base of the frequencies.
        device, dtype: of the result.
    Returns:
        cos, sin: [num_frames * height * width, head_dim // 2].
    Raises:
        ValueError: a size is not positive or head_dim is odd.
    Source: Wan2.1 wan/modules/model.py rope_params, rope_apply.
    """
    if min(num_frames, height, width) < 1:
        raise ValueError(f"num_frames, height, width must be >= 1, got {num_frames}, {height}, {width}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and >= 2, got {head_dim}")
    axis_dim = 2 * (head_dim // 6)
    angles: list[Tensor] = []
    sizes = ((num_frames, frame_offset, head_dim - 2 * axis_dim), (height, 0, axis_dim), (width, 0, axis_dim))
    for axis, (size, first, dim) in enumerate(sizes):
        position = torch.arange(first, first + size, dtype=torch.float64, device=device)
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / max(dim, 1)
        angle = torch.outer(position, theta**-exponent)  # [size, dim // 2]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(num_frames, height, width, dim // 2))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)  # [N, head_dim // 2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope_qk_norm_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (q, k) [B, num_heads, N, head_dim]; arguments as checked by `rope_qk_norm`."""
    rotation = torch.complex(cos.to(accumulation_dtype(q.dtype)), sin.to(accumulation_dtype(q.dtype)))
    rotated_q = _norm_and_rotate(q, q_weight, rotation, num_heads, eps)
    rotated_k = _norm_and_rotate(k, k_weight, rotation, num_heads, eps)
    if k_out is not None:
        rotated_k = k_out.copy_(rotated_k)
    return rotated_q, rotated_k


def _norm_and_rotate(x: Tensor, weight: Tensor, rotation: Tensor, num_heads: int, eps: float) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    # Spelled out: torch's rms_norm takes twice as long on a CPU.
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    scaled = normed.to(dtype) * weight.to(dtype)
    pairs = scaled.view(*x.shape[:2], num_heads, -1, 2).transpose(1, 2)  # [B, heads, N, head_dim/2, 2]
    return torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2).to(x.dtype)
