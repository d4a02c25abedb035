"""Which implementation an operation runs, and the argument checks every operation shares.

Owns: the choice `impl` (logged once per operation and choice), the texts of argument errors. Leaves out: the maths.
"""

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_LOGGED: set[tuple[str, str]] = set()
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_interpreting() -> bool:
    """Whether Triton kernels run in the CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def resolve_impl(op: str, impl: str | None, tensor: Tensor, choices: Sequence[str] = ("reference", "triton")) -> str:
    """Return the implementation to run: `impl` itself, or by device when None (CUDA: triton, otherwise reference).

    Args:
        op: name of the operation, for messages.
        impl: requested implementation or None.
        tensor: the input whose device and dtype decide.
        choices: implementations the operation has.
    Raises:
        ValueError: unknown `impl`; `triton` asked for on a CPU tensor outside the interpreter, or for float64.
    """
    if impl is None:
        chosen = "triton" if tensor.is_cuda and tensor.dtype in TRITON_DTYPES else "reference"
    elif impl in choices:
        chosen = impl
    else:
        raise ValueError(f"{op}: impl must be one of {', '.join(choices)} or None, got {impl!r}")
    if chosen == "triton":
        if tensor.dtype not in TRITON_DTYPES:
            raise ValueError(f"{op}: impl='triton' takes float16, bfloat16 or float32, got {tensor.dtype}")
        if not tensor.is_cuda and not is_interpreting():
            raise ValueError(
                f"{op}: impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1 on CPU), got {tensor.device}"
            )
    if not torch.compiler.is_compiling() and (op, chosen) not in _LOGGED:
        _LOGGED.add((op, chosen))
        logger.info("%s runs impl=%s on %s", op, chosen, tensor.device.type)
    return chosen


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd is to go through an operation on the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object, axes: str, like: Tensor | None = None) -> Tensor:
    """Check that `value` is a non-empty float tensor with one dimension per axis letter, on `like`'s device.

    Args:
        name: argument name, for the message.
        value: the argument.
        axes: axis names separated by spaces, e.g. "B N D".
        like: tensor whose device is expected.
    Raises:
        ValueError: not a tensor, wrong rank, zero size, integer dtype or other device.
    """
    expected = f"[{', '.join(axes.split())}]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor {expected}, got {type(value).__name__}")
    if value.ndim != len(axes.split()):
        raise ValueError(f"{name} must be {expected}, got {list(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must be {expected} with every size > 0, got {list(value.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    return value


def check_shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless `value` has the expected sizes."""
    if list(value.shape) != list(expected):
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(value.shape)}")


def check_dtype(name: str, value: Tensor, expected: torch.dtype) -> None:
    """Raise ValueError unless `value` has the expected dtype."""
    if value.dtype != expected:
        raise ValueError(f"{name} must be {expected}, got {value.dtype}")


def check_times(t: object, like: Tensor) -> Tensor:
    """Check diffusion times [N] or [N, F] for samples `like` [N, C, F, H, W] and return them as [N, F].

    Raises:
        ValueError: t has another shape, dtype kind or device.
    """
    axes = "N" if isinstance(t, Tensor) and t.ndim == 1 else "N F"
    times = check_tensor("t", t, axes, like)
    num_samples, num_frames = like.shape[0], like.shape[2]
    if times.ndim == 1:
        check_shape("t", times, [num_samples])
        return times[:, None].expand(num_samples, num_frames)
    check_shape("t", times, [num_samples, num_frames])
    return times
