"""Adaptive LayerNorm modulation and gated residual, per frame: the public functions."""

from torch import Tensor

from afd_kernels.adaln_reference import adaln_modulate_reference, gated_residual_reference
from afd_kernels.dispatch import check_dtype, check_shape, check_tensor, resolve_impl


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """LayerNorm(x) (no affine, over D) * (1 + scale_frame) + shift_frame, float32 inside, rounded once.

    Args:
        x: [B, N, D], N = F * tokens_per_frame, frame-major.
        shift, scale: [B, F, D], one dtype (x's or another float dtype; strided along B and F is fine).
        eps: added to the variance.
        impl: "reference", "triton" or None (by device).
    Returns:
        [B, N, D], x's dtype. Differentiable in x, shift, scale.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; F does not divide N.
    Source: Wan2.1 wan/modules/model.py WanAttentionBlock; Self-Forcing wan/modules/causal_model.py (per frame).
    """
    check_tensor("x", x, "B N D")
    _check_modulation("shift", shift, x)
    _check_modulation("scale", scale, x)
    check_shape("scale", scale, shift.shape)
    check_dtype("scale", scale, shift.dtype)
    if resolve_impl("adaln_modulate", impl, x) == "reference":
        return adaln_modulate_reference(x, shift, scale, eps=eps)
    from afd_kernels.adaln_triton import adaln_modulate_triton

    return adaln_modulate_triton(x, shift, scale, eps=eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str | None = None) -> Tensor:
    """x + gate_frame * y, float32 inside, rounded once.

    Args:
        x, y: [B, N, D], N = F * tokens_per_frame, frame-major, one dtype.
        gate: [B, F, D] (x's or another float dtype; strided along B and F is fine).
        impl: "reference", "triton" or None (by device).
    Returns:
        [B, N, D], x's dtype. Differentiable in x, y, gate.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; F does not divide N.
    """
    check_tensor("x", x, "B N D")
    check_shape("y", check_tensor("y", y, "B N D", x), x.shape)
    check_dtype("y", y, x.dtype)
    _check_modulation("gate", gate, x)
    if resolve_impl("gated_residual", impl, x) == "reference":
        return gated_residual_reference(x, y, gate)
    from afd_kernels.adaln_triton import gated_residual_triton

    return gated_residual_triton(x, y, gate)


def _check_modulation(name: str, value: Tensor, x: Tensor) -> None:
    check_tensor(name, value, "B F D", x)
    check_shape(name, value, [x.shape[0], value.shape[1], x.shape[2]])
    if x.shape[1] % value.shape[1]:
        raise ValueError(f"{name} must have F dividing the {x.shape[1]} tokens, got F = {value.shape[1]}")
