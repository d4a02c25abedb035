"""What belongs to one rank alone in a checkpoint: its global random streams and plain progress values.

Both must be readable with `torch.load(weights_only=True)`, so nothing here needs pickle's full power.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """The process's global random states (torch, CUDA, numpy, Python) as tensors and plain values."""
    # The legacy global generator is what libraries draw from when nobody hands them one.
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global random states to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def check_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` could not read back; subclasses such as numpy's floats included."""
    if type(value) is dict:
        for key, child in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(child, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, child in enumerate(value):
            check_plain(child, f"{where}[{index}]")
    elif type(value) not in (type(None), bool, int, float, str, bytes, Tensor):
        raise ValueError(f"{where} must be a tensor or a plain Python value, got {type(value).__name__}")
