"""RMSNorm of queries and keys followed by 3-D rotary embedding: the public functions."""

import torch
from torch import Tensor

from afd_kernels.dispatch import check_dtype, check_shape, check_tensor, resolve_impl
from afd_kernels.rope_qk_norm_reference import rope_3d_table, rope_qk_norm_reference

__all__ = ["rope_3d_table", "rope_qk_norm"]


def rope_qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    k_out: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Full-width RMSNorm of q and k, times weight, then rotation of adjacent pairs by the table's angles.

    n = (x / sqrt(mean(x^2 over width) + eps)) cast to x's dtype; y = n * weight in float32; per head and pair
    (y0, y1) -> (y0 cos - y1 sin, y0 sin + y1 cos); cast to x's dtype. Float32 inside (float64 for float64 input).

    Args:
        q, k: [B, N, num_heads * head_dim], one dtype.
        q_weight, k_weight: [num_heads * head_dim], any float dtype.
        cos, sin: [N, head_dim // 2] of `rope_3d_table`, any float dtype (float32 keeps angles to 6e-8).
        num_heads: divides the width; head_dim must be even.
        eps: added to the mean square.
        k_out: [B, num_heads, N, head_dim] (may be a strided slice of a KV cache, last stride 1); k is written there
            and k_out is returned in place of a new tensor. No gradient is recorded then.
        impl: "reference", "triton" or None (by device).
    Returns:
        q, k: [B, num_heads, N, head_dim], q's dtype. Differentiable in q, k, q_weight, k_weight.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; k_out given while a gradient is needed.
    Source: Wan2.1 wan/modules/model.py (norm over the full width, cast before the weight).
    """
    check_tensor("q", q, "B N width")
    check_shape("k", check_tensor("k", k, "B N width", q), q.shape)
    check_dtype("k", k, q.dtype)
    batch, num_tokens, width = q.shape
    if num_heads < 1 or width % num_heads or (width // num_heads) % 2:
        raise ValueError(f"num_heads must divide width {width} into an even head_dim, got {num_heads}")
    head_dim = width // num_heads
    for name, value in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_shape(name, check_tensor(name, value, "width", q), [width])
    for name, value in (("cos", cos), ("sin", sin)):
        check_shape(name, check_tensor(name, value, "N head_dim/2", q), [num_tokens, head_dim // 2])
    if k_out is not None:
        _check_k_out(k_out, [batch, num_heads, num_tokens, head_dim], q)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, q_weight, k_weight)):
            raise ValueError("k_out must be None when a gradient is needed: use torch.no_grad() for rollouts")
    if resolve_impl("rope_qk_norm", impl, q) == "reference":
        return rope_qk_norm_reference(q, k, q_weight, k_weight, cos, sin, num_heads=num_heads, eps=eps, k_out=k_out)
    from afd_kernels.rope_qk_norm_triton import rope_qk_norm_triton

    return rope_qk_norm_triton(q, k, q_weight, k_weight, cos, sin, num_heads=num_heads, eps=eps, k_out=k_out)


def _check_k_out(k_out: Tensor, expected: list[int], q: Tensor) -> None:
    check_shape("k_out", check_tensor("k_out", k_out, "B heads N head_dim", q), expected)
    check_dtype("k_out", k_out, q.dtype)
    if k_out.stride(-1) != 1:
        raise ValueError(f"k_out must have stride 1 along head_dim, got strides {list(k_out.stride())}")
