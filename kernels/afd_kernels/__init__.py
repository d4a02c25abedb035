"""Fused operations of the training step; each public function has an eager reference and a Triton implementation.

`impl=None` picks by device: CUDA runs Triton, everything else the reference. Importing this package imports no triton.
"""

from afd_kernels.adaln import adaln_modulate, gated_residual
from afd_kernels.block_causal_attention import block_causal_attention
from afd_kernels.cached_attention import cached_attention
from afd_kernels.layout import BlockCausalLayout
from afd_kernels.nft_loss import nft_loss
from afd_kernels.noising import PhiloxNoise, add_noise_and_target, philox_normal
from afd_kernels.rope_qk_norm import rope_3d_table, rope_qk_norm

__all__ = [
    "BlockCausalLayout",
    "PhiloxNoise",
    "adaln_modulate",
    "add_noise_and_target",
    "block_causal_attention",
    "cached_attention",
    "gated_residual",
    "nft_loss",
    "philox_normal",
    "rope_3d_table",
    "rope_qk_norm",
]
