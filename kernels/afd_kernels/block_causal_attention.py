"""The student's self-attention over video chunks: `block_causal_attention`, and how its implementation is chosen.

The name is the maths; `impl=` is how. Owns argument checks and the default table; each implementation lives in its own
`block_causal_attention_<impl>.py` and is imported on first use.
"""

from __future__ import annotations

import logging

from torch import Tensor

from afd_kernels.block_causal_attention_chunks import block_causal_attention_chunks
from afd_kernels.block_causal_attention_reference import block_causal_attention_reference
from afd_kernels.layout import BlockCausalLayout

logger = logging.getLogger(__name__)

IMPLS = ("reference", "triton", "chunks", "varlen", "flex")
# Device type -> (implementation, why). CPU: float32, B 16, 4 heads x 16, teacher forcing, 480 tokens, one core, forward
# + backward: chunks 24 ms, dense mask through SDPA 55 ms, reference 193 ms (benchmarks/attention.py --shapes tiny).
# CUDA: the library kernels are the safe choice while no measurement of ours is committed; benchmarks/attention.py on
# an H200 prints the table this entry is to be chosen from.
DEFAULTS = {
    "cpu": ("chunks", "measured fastest on CPU"),
    "cuda": ("chunks", "unmeasured on CUDA: library kernels, the safe order"),
}
_LOGGED: set[tuple[str, str]] = set()


def default_impl(device_type: str) -> str:
    """Implementation used for `impl=None`; logged once per device type."""
    impl, reason = DEFAULTS.get(device_type, ("reference", "no entry for this device"))
    if (device_type, impl) not in _LOGGED:
        _LOGGED.add((device_type, impl))
        logger.info("block_causal_attention runs impl=%s on %s (%s)", impl, device_type, reason)
    return impl


def parse_impl(impl: str) -> tuple[str, str]:
    """Split `name[:option]` and check both; whether it is installed shows when it is used.

    Returns:
        (name, option), the option empty where the best installed one is meant.
    Raises:
        ValueError: there is no such implementation or option.
    """
    from afd_kernels.block_causal_attention_backends import DENSE_BACKENDS, VARLEN_BACKENDS
    from afd_kernels.block_causal_attention_triton import VARIANTS

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
        impl: `reference`; `triton[:tma|specialized|pointer]`; `chunks[:flash3|flash2|sdpa|cudnn|hub]`;
            `varlen[:flash3|flash2|torch]`; `flex`. Without a suffix the best installed one. None picks by device.
        scale: None for 1 / sqrt(D).
    Returns:
        [B, heads, N, D] in q's dtype.
    Raises:
        ValueError: shapes or dtypes disagree, or the implementation is unknown or cannot take the inputs.
        ImportError: the implementation is not installed; the text says how to install it.
    """
    _check(q, k, v, layout)
    name, option = parse_impl(impl or default_impl(q.device.type))
    if name == "chunks":
        from afd_kernels.block_causal_attention_backends import best_dense_backend, dense_backend

        dense = dense_backend(option or _dense_backend_for(q, best_dense_backend(q.is_cuda)))
        return block_causal_attention_chunks(q, k, v, layout, scale=scale, dense=dense)
    if name == "triton":
        from afd_kernels.block_causal_attention_triton import block_causal_attention_triton

        return block_causal_attention_triton(q, k, v, layout, scale=scale, variant=option or "tma")
    if name == "varlen":
        from afd_kernels.block_causal_attention_backends import best_varlen_backend, varlen_backend
        from afd_kernels.block_causal_attention_varlen import block_causal_attention_varlen

        attend = varlen_backend(option or best_varlen_backend())
        return block_causal_attention_varlen(q, k, v, layout, attend=attend, scale=scale)
    if name == "flex":
        from afd_kernels.block_causal_attention_flex import block_causal_attention_flex

        return block_causal_attention_flex(q, k, v, layout, scale=scale)
    return block_causal_attention_reference(q, k, v, layout, scale=scale)


def _dense_backend_for(q: Tensor, best: str) -> str:
    """FlashAttention takes half precision only; PyTorch picks a kernel for the rest."""
    return best if q.element_size() == 2 else "sdpa"


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


__all__ = ["DEFAULTS", "IMPLS", "BlockCausalLayout", "block_causal_attention", "default_impl", "parse_impl"]
