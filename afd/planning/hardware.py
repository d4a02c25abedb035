"""Accelerators, networks, and how much of their peak work like ours reaches: every assumption of a prediction.

Peaks are the vendors' data sheets (dense bfloat16, no sparsity). Efficiencies and prices are assumptions, printed with
every plan; nothing of ours has been timed on these machines yet.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: on the command line.
        memory: bytes.
        flops: peak, FLOP/s in bfloat16.
        bandwidth: of its memory, bytes/s.
        nvlink: what a rank sends or receives within a node, bytes/s in one direction.
        price: assumed rent, $ per GPU and hour.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    price: float


@dataclass(frozen=True)
class Interconnect:
    """The network between nodes: `node_bandwidth` is bytes/s in one direction over all of a node's adapters."""

    name: str
    node_bandwidth: float
    latency: float


GPUS = {
    "h100-80g": Gpu("h100-80g", 80 * GIB, 989e12, 3.35e12, 450e9, 2.5),
    "h200-141g": Gpu("h200-141g", 131 * GIB, 989e12, 4.8e12, 450e9, 3.5),
    "a100-80g": Gpu("a100-80g", 80 * GIB, 312e12, 2.04e12, 300e9, 1.6),
    "a100-40g": Gpu("a100-40g", 40 * GIB, 312e12, 1.55e12, 300e9, 1.2),
}

INTERCONNECTS = {
    "ib-400": Interconnect("ib-400", 8 * 50e9, 8e-6),
    "ib-200": Interconnect("ib-200", 4 * 25e9, 8e-6),
    "ethernet-100": Interconnect("ethernet-100", 12.5e9, 30e-6),
}
"""ib-400: eight 400 Gb/s adapters a node; ib-200: four of 200 Gb/s; ethernet-100: one of 100 Gb/s."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a peak that are assumed to be reached.

    Attributes:
        matmul: of the arithmetic peak, in linear layers.
        attention_forward, attention_backward: of the arithmetic peak.
        memory: of the memory's bandwidth.
        network: of NVLink's and the network's bandwidth.
        overlap: share of a phase's computation that overlapped collectives may hide behind.
        usable_memory: share of the device's memory that allocations may fill: the rest is CUDA's context, NCCL's
            buffers and fragmentation.
    """

    matmul: float = 0.65
    attention_forward: float = 0.55
    attention_backward: float = 0.50
    memory: float = 0.80
    network: float = 0.80
    overlap: float = 0.80
    usable_memory: float = 0.92


ASSUMED = Efficiency()
PCIE = 50e9
"""Bytes/s between a GPU and its host, one direction (PCIe 5 x 16)."""
HOST_ADAM = 25e9
"""Bytes/s of optimizer state that one GPU's share of a host's cores updates."""
