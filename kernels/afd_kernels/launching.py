"""How the element-wise and row-wise Triton kernels are launched: tile sizes, number of programs, device guard."""

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

TILE_ELEMENTS = 1024  # of an element-wise tile: 8 per thread with 4 warps, one 16-byte load in bf16


def next_power_of_2(value: int) -> int:
    """Smallest power of two >= value, value >= 1."""
    return 1 << (value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """value / divisor rounded up."""
    return -(-value // divisor)


def element_tile(num_rows: int, row_size: int) -> tuple[int, int]:
    """(rows, columns) of a tile of at most TILE_ELEMENTS over `num_rows` contiguous rows of `row_size` elements."""
    columns = min(TILE_ELEMENTS, next_power_of_2(row_size))
    return min(TILE_ELEMENTS // columns, next_power_of_2(num_rows)), columns


def row_warps(block: int, dtype: torch.dtype) -> int:
    """Warps for a program that holds whole rows of `block` elements in registers: 32 bytes of a row per thread.

    (More per thread spills a float32 backward pass, see tests/afd_kernels/test_machine_code.py.)
    """
    return max(1, min(16, block * dtype.itemsize // 1024))


def rows_per_program(num_rows: int, num_groups: int, device: torch.device, *, smallest: int = 8) -> int:
    """Rows each program of a reduction walks, so that about eight programs per multiprocessor share all rows.

    Args:
        num_rows: rows of one group; programs do not cross groups.
        num_groups: independent groups.
        device: its multiprocessor count decides.
        smallest: fewest rows worth one partial sum.
    """
    wanted = 8 * _multiprocessors(device)
    return min(num_rows, max(smallest, ceil_div(num_rows * num_groups, wanted)))


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
