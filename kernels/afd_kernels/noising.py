"""Forward process of rectified flow, state and velocity target in one pass: the public function."""

from torch import Tensor

from afd_kernels.dispatch import check_dtype, check_shape, check_tensor, check_times, resolve_impl
from afd_kernels.noising_reference import PhiloxNoise, add_noise_and_target_reference, philox_normal

__all__ = ["PhiloxNoise", "add_noise_and_target", "philox_normal"]


def add_noise_and_target(
    x0: Tensor, eps: Tensor | PhiloxNoise, t: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) x0 + t eps and v* = eps - x0, computed in float32 and rounded once.

    Args:
        x0: [N, C, F, H, W] clean latents.
        eps: standard normal noise of x0's shape and dtype; or `PhiloxNoise(seed, offset)`: drawn inside, element by
            element from a counter, the same for every implementation and launch shape, never stored.
        t: [N] or [N, F] in [0, 1], 0 clean.
        impl: "reference", "triton" or None (by device).
    Returns:
        x_t, v_target: [N, C, F, H, W], x0's dtype. Differentiable in x0 and eps.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; t requires a gradient.
    """
    check_tensor("x0", x0, "N C F H W")
    if not isinstance(eps, PhiloxNoise):
        check_shape("eps", check_tensor("eps", eps, "N C F H W", x0), x0.shape)
        check_dtype("eps", eps, x0.dtype)
    times = check_times(t, x0)
    if t.requires_grad:
        raise ValueError("t must not require a gradient, got requires_grad=True")
    if resolve_impl("add_noise_and_target", impl, x0) == "reference":
        return add_noise_and_target_reference(x0, eps, times)
    from afd_kernels.noising_triton import add_noise_and_target_triton

    return add_noise_and_target_triton(x0, eps, times)
