"""Devices that a user names."""

from __future__ import annotations

import torch


def checked_device(text: str | None, field: str) -> torch.device:
    """The device that a field or an option names; by default a GPU where there is one.

    Args:
        text: `cpu`, `cuda`, `cuda:1`, ..., or None.
        field: its name, for the message.
    Raises:
        ValueError: it is no such name, or torch does not see that device.
    """
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{field} must be cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{field} must be cpu or one of the {count} CUDA devices that torch sees, got {text!r}")
    return device
