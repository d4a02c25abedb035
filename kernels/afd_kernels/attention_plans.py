"""Tile shapes of the attention kernels, per device: which spill nothing and fit a block's shared memory; key splits.

Owns the choice; the launches are in `block_causal_attention_triton` and `cached_attention_triton`. The machine code
that every row below becomes is checked by the tests, device by device; its speed is unmeasured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

VARIANTS = ("tma", "specialized", "pointer")
OLDEST_CAPABILITY = 80
MAX_SPLITS = 8
INTERPRETED_CAPABILITY = 90  # what Triton's interpreter stands in for: the checks on a CPU walk Hopper's tiles


@dataclass(frozen=True)
class Tiles:
    """Tile shape and launch options of one kernel.

    Args:
        block_m: query rows of a tile.
        block_n: key rows of a tile.
        num_warps: of the kernel; a specialized one gets 8 more for its loads and second half.
        num_stages: depth of the load pipeline.
        tma: load tiles with tensor descriptors.
        specialize: give loads and arithmetic their own warps.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    specialize: bool = False

    @property
    def launch_options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "TMA": self.tma,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Plan:
    """Tiles of the kernels: three of training, and cached attention's."""

    forward: Tiles
    key_value_grad: Tiles
    query_grad: Tiles
    cached: Tiles


# (group of devices, variant) -> (queries, keys) of a tile of: forward, dK and dV, dQ, cached. For half precision with
# D = 64 and 128, with 8 warps and two stages: the largest that spill nothing at D = 128 and fit a block's shared memory
# (227 KiB on Hopper and data-centre Blackwell, 163 on A100, 99 on RTX cards, which share A100's tiles).
_TILES = {
    ("ampere", "pointer"): ((128, 64), (64, 64), (128, 32), (128, 64)),
    ("hopper", "tma"): ((128, 128), (64, 128), (128, 128), (128, 128)),
    ("hopper", "specialized"): ((128, 128), (64, 128), (128, 128), (128, 128)),
    ("hopper", "pointer"): ((128, 128), (32, 128), (128, 64), (128, 128)),
    ("blackwell", "tma"): ((128, 64), (64, 128), (128, 128), (128, 128)),
    ("blackwell", "pointer"): ((128, 64), (64, 64), (128, 64), (128, 64)),
    ("blackwell_rtx", "tma"): ((128, 64), (64, 64), (64, 64), (128, 64)),
    ("blackwell_rtx", "pointer"): ((64, 64), (64, 64), (64, 64), (128, 64)),
}


def choose_plan(head_dim: int, dtype: torch.dtype, variant: str | None, capability: int) -> Plan:
    """Tile shapes for a head dimension, dtype, variant and device.

    Half precision, D = 64 and 128: `tma` loads with tensor descriptors, `specialized` also splits the forward's warps
    into loaders and workers, `pointer` needs neither. Everything else: small pointer tiles.

    Args:
        head_dim: D.
        dtype: of q, k and v.
        variant: one of VARIANTS; None for the device's preferred one.
        capability: compute capability x 10.
    Raises:
        ValueError: the variant is unknown or not for this device.
    """
    variant = check_variant(variant, capability)
    if dtype == torch.float32:
        return Plan(*[Tiles(32, 32, 4, 1)] * 4)
    if head_dim < 64:
        return Plan(*[Tiles(64, 64, 4, 2)] * 4)
    tiles = [Tiles(m, n, 8, 2, tma=variant != "pointer") for m, n in _TILES[_group(capability), variant]]
    if variant == "specialized":
        tiles[0] = replace(tiles[0], num_warps=4, specialize=True)
    return Plan(*tiles)


def _group(capability: int) -> str:
    if capability < 90:
        return "ampere"
    if capability < 100:
        return "hopper"
    return "blackwell" if capability < 120 else "blackwell_rtx"


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Compute capability x 10 of a GPU (90: Hopper); the interpreter's for a CPU."""
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def variants_of(capability: int) -> tuple[str, ...]:
    """The variants a device can run, the preferred one first; none before Ampere."""
    if capability < OLDEST_CAPABILITY:
        return ()
    if capability < 90:
        return ("pointer",)
    return VARIANTS if capability == 90 else ("tma", "pointer")


def check_variant(variant: str | None, capability: int) -> str:
    """The variant to run: the one asked for, or the device's preferred one.

    Raises:
        ValueError: unknown, or not for this device.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"the triton variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    possible = variants_of(capability)
    if not possible:
        raise ValueError(f"impl='triton' needs compute capability 8.0 or newer, got {capability / 10}")
    if variant is not None and variant not in possible:
        text = f"the triton variant must be one of {', '.join(possible)}"
        raise ValueError(f"{text} for compute capability {capability / 10}, got {variant!r}")
    return variant or possible[0]


def choose_splits(programs: int, key_tiles: int, processors: int) -> int:
    """Fewest splits that keep the processors within 10 % of as busy as any number of splits could.

    Args:
        programs: query tiles x batch x heads, without splitting.
        key_tiles: key tiles each of them walks; a split gets at least two.
        processors: of the device.
    Returns:
        1 to MAX_SPLITS.
    """
    most = max(1, min(MAX_SPLITS, key_tiles // 2))
    busy = [programs * s / (-(-programs * s // processors) * processors) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(busy, 1) if share >= 0.9 * max(busy))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for a CPU, so that the checks on one split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
