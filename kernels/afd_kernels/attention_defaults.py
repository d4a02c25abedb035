"""Which implementation `impl=None` means: the fastest that was measured on this kind of device and can run here.

`attention_defaults.csv` is the table of measurements, fastest first per operation, device and dtype;
`python benchmarks/attention.py --write_defaults` measures a device and writes its rows. Where a device has none, those
of another with the same compute capability count, and else the caller's own choice.
"""

from __future__ import annotations

import csv
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from afd_kernels.attention_plans import compute_capability

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_suffix(".csv")
_LOGGED: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class DefaultRow:
    """One row of the table.

    Args:
        operation: `block_causal_attention` or `cached_attention`.
        device: name of the GPU, or `cpu`.
        capability: compute capability x 10; 0 for a CPU.
        dtype: as torch names it, without `torch.`.
        impl: what the operation's `impl` takes.
        median_ms: geometric mean over `shapes` of the median time of forward + backward (cached: forward), ms.
        shapes: what was measured.
        commit, versions, date: where the rows come from.
    """

    operation: str
    device: str
    capability: int
    dtype: str
    impl: str
    median_ms: float
    shapes: str
    commit: str
    versions: str
    date: str


def read_table(path: Path = TABLE) -> list[DefaultRow]:
    """All rows of a table of measurements, as they stand in it.

    Raises:
        ValueError: the columns are not a default's.
    """
    names = [field.name for field in fields(DefaultRow)]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} must have the columns {names}, got {reader.fieldnames}")
        return [
            DefaultRow(**{**row, "capability": int(row["capability"]), "median_ms": float(row["median_ms"])})
            for row in reader
        ]


@functools.cache
def measured_order(operation: str, device: str, capability: int, dtype: str) -> tuple[str, tuple[str, ...]]:
    """(device measured, its implementations, fastest first): this device's, or those of its compute capability."""
    rows = [row for row in read_table() if (row.operation, row.dtype) == (operation, dtype)]
    found = [row for row in rows if row.device == device]
    if not found:
        related = [row for row in rows if row.capability == capability and capability > 0]
        found = [row for row in related if row.device == related[-1].device]
    found.sort(key=lambda row: row.median_ms)
    return (found[0].device if found else "", tuple(row.impl for row in found))


def default_impl(
    operation: str, device: torch.device, dtype: torch.dtype, check: Callable[[str], None], fallback: str
) -> str:
    """The implementation of an operation on a device in a dtype; each choice is logged once.

    Args:
        operation: as in the table.
        device, dtype: of its inputs.
        check: raises ValueError or ImportError for an implementation that is not installed or cannot take the inputs.
        fallback: where nothing measured is usable.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    capability = compute_capability(device) if device.type == "cuda" else 0
    number = str(dtype).removeprefix("torch.")
    measured_on, order = measured_order(operation, name, capability, number)
    impl = next((each for each in order if _passes(check, each)), None)
    reason = f"fastest of those measured on {measured_on} that can run here"
    if impl is None:
        impl, reason = fallback, f"not measured on {name} in {number}: the library kernel, the safe choice"
    if (operation, name, impl) not in _LOGGED:
        _LOGGED.add((operation, name, impl))
        logger.info("%s runs impl=%s on %s (%s)", operation, impl, name, reason)
    return impl


def _passes(check: Callable[[str], None], impl: str) -> bool:
    try:
        check(impl)
    except (ValueError, ImportError):
        return False
    return True
