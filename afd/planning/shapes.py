"""Students that can be planned before their weights are on this machine."""

from __future__ import annotations

from afd.config import StudentShape


def _wan(num_layers: int, num_heads: int, ffn_dim: int) -> StudentShape:
    return StudentShape(
        in_channels=16, out_channels=16, patch_size=(1, 2, 2), num_layers=num_layers, num_heads=num_heads, head_dim=128,
        ffn_dim=ffn_dim, freq_dim=256, text_len=512, text_dim=4096, chunk_frames=3,
    )  # fmt: skip


WAN_SHAPES = {"wan-1.3b": _wan(30, 12, 8960), "wan-14b": _wan(40, 40, 13824)}
"""Causal Wan2.1 T2V. Source: Wan-Video/Wan2.1 wan/configs (dimensions); chunk of 3 latent frames: Self-Forcing."""
