"""Eager oracle of the forward process, and Philox4x32-10 normal noise in plain integer tensor operations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_kernels.dispatch import accumulation_dtype

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


@dataclass(frozen=True)
class PhiloxNoise:
    """Standard normal noise named by a counter: element i is lane i % 4 of Philox4x32-10(seed, offset + i // 4).

    Attributes:
        seed: key, 0 <= seed < 2**63.
        offset: first counter, >= 0; a tensor of n elements uses (n + 3) // 4 counters. Advance by that for fresh noise.
    """

    seed: int
    offset: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if not 0 <= self.offset < 2**62:
            raise ValueError(f"offset must be in [0, 2**62), got {self.offset}")


def add_noise_and_target_reference(x0: Tensor, eps: Tensor | PhiloxNoise, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_t, v_target) for x0 [N, C, F, H, W], eps of that shape or a noise name, times [N, F]."""
    dtype = accumulation_dtype(x0.dtype)
    clean = x0.to(dtype)
    if isinstance(eps, PhiloxNoise):
        noise = philox_normal(eps, x0.shape, device=x0.device).to(dtype)
    else:
        noise = eps.to(dtype)
    v_target = noise - clean
    x_t = clean + times.to(dtype)[:, None, :, None, None] * v_target
    return x_t.to(x0.dtype), v_target.to(x0.dtype)


def philox_normal(noise: PhiloxNoise, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Draw the noise a `PhiloxNoise` names: float32 of the given shape.

    Box-Muller on uniforms at the centres of 2^23 cells of (0, 1): |noise| <= 5.77.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
    """
    count = math.prod(shape)
    counter = torch.arange((count + 3) // 4, device=device, dtype=torch.int64) + noise.offset
    words = [counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key_a, key_b = noise.seed & _MASK, noise.seed >> 32
    for _ in range(10):
        high_a, low_a = _multiply(words[0], _ROUND_A)
        high_b, low_b = _multiply(words[2], _ROUND_B)
        words = [high_b ^ words[1] ^ key_a, low_b, high_a ^ words[3] ^ key_b, low_a]
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    uniform = [((word >> 9).to(torch.float64) + 0.5) * 2.0**-23 for word in words]
    normals: list[Tensor] = []
    for u, angle in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius = torch.sqrt(-2.0 * torch.log(u))
        normals += [radius * torch.cos(2 * math.pi * angle), radius * torch.sin(2 * math.pi * angle)]
    return torch.stack(normals, dim=-1).flatten()[:count].view(*shape).to(torch.float32)


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow (16-bit halves of the constant)."""
    upper, lower = constant >> 16, constant & 0xFFFF
    partial = word * lower  # < 2**48
    total = word * upper + (partial >> 16)  # < 2**49
    return total >> 16, ((total & 0xFFFF) << 16) | (partial & 0xFFFF)
