"""Dense attention kernels that may or may not be installed: FlashAttention 3 and 2, a Hugging Face kernel, PyTorch.

Owns finding them and their calling conventions; imports nothing optional until it is asked for. All of them are
maskless; scores, masks and chunks are their callers' business.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afd_kernels.block_causal_attention_chunks import DenseAttention, sdpa

DENSE_BACKENDS = ("flash3", "flash2", "sdpa", "cudnn", "hub")
VARLEN_BACKENDS = ("flash3", "flash2", "torch")
FLASH_DTYPES = (torch.float16, torch.bfloat16)
HUB_REPOSITORY = "kernels-community/flash-attn3"
_MODULES = {"flash3": "flash_attn_interface", "flash2": "flash_attn", "hub": "kernels"}
_INSTALL = {
    "flash3": "build FlashAttention's `hopper` folder (github.com/Dao-AILab/flash-attention), "
    "which installs `flash_attn_interface`",
    "flash2": "pip install -e '.[cuda]' (flash-attn; needs nvcc or a matching wheel)",
    "hub": "pip install kernels (the Hugging Face package; it downloads the kernel on first use)",
    "cudnn": "use a CUDA build of torch with cuDNN",
    "torch": "use a CUDA build of torch >= 2.10",
}
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, "float | None"], Tensor]


@functools.cache
def is_installed(backend: str) -> bool:
    """Whether a backend can be imported; nothing is imported."""
    if backend == "sdpa":
        return True
    if backend == "cudnn":
        return torch.backends.cuda.is_built() and torch.backends.cudnn.is_available()
    if backend == "torch":
        return torch.backends.cuda.is_built() and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    spec = importlib.util.find_spec(_MODULES[backend])
    # A folder named `kernels` on the path is found as a namespace without a loader: that is not the package.
    return spec is not None and spec.loader is not None and spec.origin is not None


def check_backend(backend: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the backend is one of the choices, ImportError with how to install it where it is not."""
    if backend not in choices:
        raise ValueError(f"the attention backend must be one of {', '.join(choices)}, got {backend!r}")
    if not is_installed(backend):
        raise ImportError(f"attention backend {backend!r} is not installed; to install it: {_INSTALL[backend]}")


def best_dense_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The first installed backend of DENSE_BACKENDS; `sdpa` on CPU and for more than half precision."""
    return next(filter(is_installed, DENSE_BACKENDS)) if device.type == "cuda" and dtype in FLASH_DTYPES else "sdpa"


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scale)


@functools.cache
def dense_backend(backend: str) -> DenseAttention:
    """Maskless attention on [B, heads, N, D] by the named backend.

    Raises:
        ValueError: unknown backend.
        ImportError: not installed; the text says how to install it.
    The function it returns raises a ValueError for a dtype the backend does not take.
    """
    check_backend(backend, DENSE_BACKENDS)
    if backend == "sdpa":
        return sdpa
    if backend == "cudnn":
        return _cudnn
    if backend == "hub":
        flash = importlib.import_module("kernels").get_kernel(HUB_REPOSITORY).flash_attn_func
    else:
        flash = importlib.import_module(_MODULES[backend]).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        check_dtype(backend, q.dtype)
        out = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale)
        return _first(out).transpose(1, 2)

    return attend


def best_varlen_backend() -> str:
    """The first installed backend of VARLEN_BACKENDS.

    Raises:
        ImportError: none is installed; the text says how to install one.
    """
    for backend in VARLEN_BACKENDS:
        if is_installed(backend):
            return backend
    raise ImportError(f"impl='varlen' needs a varlen kernel; to install one: {_INSTALL['flash2']}")


@functools.cache
def varlen_backend(backend: str) -> VarlenAttention:
    """Packed attention on [tokens, heads, D] by the named backend.

    Raises:
        ValueError: unknown backend.
        ImportError: not installed; the text says how to install it.
    """
    check_backend(backend, VARLEN_BACKENDS)
    if backend == "torch":
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn

        def attend_torch(
            q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
            scale: float | None,
        ) -> Tensor:  # fmt: skip
            check_dtype(backend, q.dtype)
            options = {} if scale is None else {"scale": scale}
            return varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)

        return attend_torch
    flash = importlib.import_module(_MODULES[backend]).flash_attn_varlen_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        check_dtype(backend, q.dtype)
        return _first(flash(q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale=scale))

    return attend


def check_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raise ValueError where a backend other than `sdpa` is to take more than half precision."""
    if backend != "sdpa" and dtype not in FLASH_DTYPES:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in FLASH_DTYPES)
        raise ValueError(f"attention backend {backend!r} takes {names}, got {dtype}")


def _first(out: Any) -> Tensor:
    """FlashAttention 3 returned (out, lse) in some versions and out in others."""
    return out[0] if isinstance(out, tuple) else out
