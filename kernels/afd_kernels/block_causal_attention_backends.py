"""Dense attention kernels that may or may not be installed: FlashAttention 3 and 2, built or from the Hugging Face hub,
and PyTorch's.

Owns finding and loading them and their calling conventions; imports nothing optional until it is asked for. All of them
are maskless; scores, masks and chunks are their callers' business.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afd_kernels.attention_plans import choose_splits, processors
from afd_kernels.block_causal_attention_chunks import DenseAttention, sdpa

logger = logging.getLogger(__name__)

# In order of preference where nothing is measured: what needs a download is never taken unasked.
DENSE_BACKENDS = ("flash3", "flash2", "sdpa", "cudnn", "hub3", "hub2")
VARLEN_BACKENDS = ("flash3", "flash2", "torch", "hub3", "hub2")
FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Repository and major version, which the `kernels` package requires since 0.15; the versions are diffusers'.
HUB_KERNELS = {"hub3": ("kernels-community/flash-attn3", 1), "hub2": ("kernels-community/flash-attn2", 3)}
_MODULES = {"flash3": "flash_attn_interface", "flash2": "flash_attn", **dict.fromkeys(HUB_KERNELS, "kernels")}
_SPLITS_ON_REQUEST = ("flash3", "hub3")  # version 2 and PyTorch's copy of it split the keys where queries are few
_HUB_HELP = "pip install -e '.[hub]' (Hugging Face's `kernels` package; it downloads the built kernel on first use)"
_INSTALL = {
    "flash3": "build FlashAttention's `hopper` folder (github.com/Dao-AILab/flash-attention), "
    "which installs `flash_attn_interface`",
    "flash2": "pip install -e '.[cuda]' (flash-attn; needs nvcc or a matching wheel)",
    **dict.fromkeys(HUB_KERNELS, _HUB_HELP),
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


def check_usable(backend: str, choices: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> None:
    """Check that a backend is installed, takes such inputs, and loads.

    Raises:
        ValueError: unknown backend, or one that does not take the device or dtype.
        ImportError: it is not installed, or does not load.
    """
    check_backend(backend, choices)
    check_dtype(backend, dtype)
    if backend == "sdpa":
        return
    if device.type != "cuda":
        raise ValueError(f"attention backend {backend!r} needs CUDA tensors, got {device}")
    if backend in _MODULES:
        _library(backend)


@functools.cache
def _library(backend: str) -> Any:
    """The module of a library that is installed.

    Raises:
        ImportError: it does not load: built for another torch or GPU, or not to be downloaded.
    """
    try:
        if backend in HUB_KERNELS:
            repository, version = HUB_KERNELS[backend]
            return importlib.import_module("kernels").get_kernel(repository, version=version)
        return importlib.import_module(_MODULES[backend])
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise ImportError(f"attention backend {backend!r} is installed but does not load: {text}") from error


@functools.cache
def _loads(backend: str) -> bool:
    """Whether a backend is installed and can be imported; an installed one that cannot is warned of."""
    if not is_installed(backend):
        return False
    if backend in _MODULES:
        try:
            _library(backend)
        except ImportError as error:
            logger.warning("%s", error)
            return False
    return True


def best_dense_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The first of DENSE_BACKENDS that is installed and loads; `sdpa` on CPU and for more than half precision."""
    return next(filter(_loads, DENSE_BACKENDS)) if device.type == "cuda" and dtype in FLASH_DTYPES else "sdpa"


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scale)


@functools.cache
def dense_backend(backend: str) -> DenseAttention:
    """Maskless attention on [B, heads, N, D] by the named backend.

    Raises:
        ValueError: unknown backend.
        ImportError: it is not installed (the text says how to install it), or does not load.
    The function it returns raises a ValueError for a dtype the backend does not take.
    """
    check_backend(backend, DENSE_BACKENDS)
    if backend == "sdpa":
        return sdpa
    if backend == "cudnn":
        return _cudnn
    flash = _library(backend).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        check_dtype(backend, q.dtype)
        options = {"num_splits": _key_splits(q, k)} if backend in _SPLITS_ON_REQUEST else {}
        out = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, **options)
        return _first(out).transpose(1, 2)

    return attend


def _key_splits(q: Tensor, k: Tensor) -> int:
    """Splits of the keys where tiles of 128 queries leave processors idle (less than two rounds); else one."""
    programs = q.shape[0] * q.shape[1] * -(-q.shape[2] // 128)
    available = processors(q.device)
    return choose_splits(programs, -(-k.shape[2] // 128), available) if programs < 2 * available else 1


def best_varlen_backend() -> str:
    """The first of VARLEN_BACKENDS that is installed and loads.

    Raises:
        ImportError: there is none; the text says how to install one.
    """
    for backend in VARLEN_BACKENDS:
        if _loads(backend):
            return backend
    raise ImportError(f"impl='varlen' needs a varlen kernel; to install one: {_INSTALL['flash2']}, or {_HUB_HELP}")


@functools.cache
def varlen_backend(backend: str) -> VarlenAttention:
    """Packed attention on [tokens, heads, D] by the named backend.

    Raises:
        ValueError: unknown backend.
        ImportError: it is not installed (the text says how to install it), or does not load.
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
    flash = _library(backend).flash_attn_varlen_func

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
