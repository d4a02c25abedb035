"""The student's self-attention over video chunks: `block_causal_attention`, and how its implementation is chosen.

The name is the maths; `impl=` is how. Owns argument checks; each implementation lives in its own
`block_causal_attention_<impl>.py` and is imported on first use.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from afd_kernels.attention_defaults import default_impl
from afd_kernels.block_causal_attention_chunks import block_causal_attention_chunks
from afd_kernels.block_causal_attention_reference import block_causal_attention_reference
from afd_kernels.layout import BlockCausalLayout

IMPLS = ("reference", "triton", "chunks", "varlen", "flex")


def parse_impl(impl: str) -> tuple[str, str]:
    """Split `name[:option]` and check both; whether it is installed shows when it is used.

    Returns:
        (name, option), the option empty where the best installed one is meant.
    Raises:
        ValueError: there is no such implementation or option.
    """
    from afd_kernels.attention_plans import VARIANTS
    from afd_kernels.block_causal_attention_backends import DENSE_BACKENDS, VARLEN_BACKENDS

    options = {"chunks": DENSE_BACKENDS, "varlen": VARLEN_BACKENDS, "triton": VARIANTS}
    name, _, option = impl.partition(":")
    if name not in IMPLS or (option and name not in options):
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if option and option not in options[name]:
        word = "variant" if name == "triton" else "backend"
        raise ValueError(f"the {name} {word} must be one of {', '.join(options[name])}, got {option!r}")
    return name, option


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, *, impl: str | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T, over the keys the layout shows) v, with gradients for q, k and v.

    Args:
        q, k, v: [B, heads, N, D], N == layout.num_tokens; any batch and head strides. With teacher forcing the clean
            frames come first, then the noisy ones.
        layout: who sees whom.
        impl: `reference`; `triton[:tma|specialized|pointer]`; `chunks[:flash3|flash2|sdpa|cudnn|hub3|hub2]`;
            `varlen[:flash3|flash2|torch|hub3|hub2]`; `flex`. Without a suffix the best installed one, or the device's
            preferred variant. None for the fastest that was measured on the device and can run here
            (`attention_defaults`).
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, N, D] in q's dtype.
    Raises:
        ValueError: shapes or dtypes disagree, or the implementation is unknown or cannot take the inputs.
        ImportError: the implementation is not installed; the text says how to install it.
    """
    _check(q, k, v, layout)
    name, option = parse_impl(impl or _default(q.device, q.dtype, q.shape[-1]))
    if name == "chunks":
        from afd_kernels.block_causal_attention_backends import best_dense_backend, dense_backend

        dense = dense_backend(option or best_dense_backend(q.device, q.dtype))
        return block_causal_attention_chunks(q, k, v, layout, scale=scale, dense=dense)
    if name == "triton":
        from afd_kernels.block_causal_attention_triton import block_causal_attention_triton

        return block_causal_attention_triton(q, k, v, layout, scale=scale, variant=option or None)
    if name == "varlen":
        from afd_kernels.block_causal_attention_backends import best_varlen_backend, varlen_backend
        from afd_kernels.block_causal_attention_varlen import block_causal_attention_varlen

        attend = varlen_backend(option or best_varlen_backend())
        return block_causal_attention_varlen(q, k, v, layout, attend=attend, scale=scale)
    if name == "flex":
        from afd_kernels.block_causal_attention_flex import block_causal_attention_flex

        return block_causal_attention_flex(q, k, v, layout, scale=scale)
    return block_causal_attention_reference(q, k, v, layout, scale=scale)


def check_impl(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Check that an implementation is installed and trains on such inputs, before there are any.

    Raises:
        ValueError: it is unknown, or does not take the device, dtype or head dimension.
        ImportError: it is not installed (the text says how to install it), or does not load.
    """
    from afd_kernels import block_causal_attention_backends as backends
    from afd_kernels.block_causal_attention_flex import FLEX_NEEDS_CUDA
    from afd_kernels.block_causal_attention_triton import check_support

    name, option = parse_impl(impl)
    if name == "triton":
        check_support(device, dtype, head_dim, option or None)
    elif name == "varlen" or (name == "chunks" and option):
        choices = backends.VARLEN_BACKENDS if name == "varlen" else backends.DENSE_BACKENDS
        backends.check_usable(option or backends.best_varlen_backend(), choices, device, dtype)
    elif name == "flex" and device.type != "cuda":
        raise ValueError(FLEX_NEEDS_CUDA)


@functools.cache
def _default(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    from afd_kernels.block_causal_attention_backends import best_dense_backend

    fallback = f"chunks:{best_dense_backend(device, dtype)}"
    check = functools.partial(check_impl, device=device, dtype=dtype, head_dim=head_dim)
    return default_impl("block_causal_attention", device, dtype, check, fallback)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout) -> None:
    if q.ndim != 4 or q.shape[2] != layout.num_tokens:
        raise ValueError(f"q must be [B, heads, {layout.num_tokens}, D] for this layout, got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point, got {q.dtype}")


__all__ = ["IMPLS", "BlockCausalLayout", "block_causal_attention", "check_impl", "parse_impl"]
