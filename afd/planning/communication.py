"""What every rank exchanges in a step: collectives by phase, in bytes of the whole tensor.

The student's update depends on how v_old and v_ref are computed (`nft.velocities`). Bulk only: DeepSpeed's checks of
traces (a few KB of broadcasts when the order of modules changes), norms and metrics are left out, and so is the padding
of tensors to a multiple of the ranks. Counted collectives of real two-rank steps are equal (test_measured.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afd.config import StudentShape
from afd.planning.workload import Workload

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in one phase of a step.

    Attributes:
        kind: what is done.
        size: bytes of the whole tensors, over all calls.
        in_node: every one of them stays inside a node (hpZ).
        is_overlapped: runs beside the computation.
    """

    kind: Kind
    size: int
    in_node: bool = False
    is_overlapped: bool = True

    def sent(self, ranks: int) -> float:
        """Bytes a rank sends in a ring of `ranks`."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.size * (ranks - 1) / ranks


def plan_transfers(work: Workload) -> dict[str, list[Transfer]]:
    """Collectives of a step by phase; none for one rank."""
    if work.num_gpus == 1:
        return {"rollout": [], "discriminator": [], "update": []}
    return {"rollout": _rollout(work), "discriminator": _discriminator(work), "update": _update(work)}


def total_bytes(transfers: list[Transfer], kind: Kind) -> int:
    """Bytes of whole tensors in collectives of a kind."""
    return sum(transfer.size for transfer in transfers if transfer.kind == kind)


def _rollout(work: Workload) -> list[Transfer]:
    if work.student.stage < 3:
        return []
    return [Transfer("all_gather", work.weights * work.student.width, is_overlapped=False)]


def _discriminator(work: Workload) -> list[Transfer]:
    engine, count = work.discriminator, work.discriminator_parameters.trained
    size, steps = count * engine.width, work.discriminator_steps
    if engine.stage == 3:
        passes = steps * engine.accumulation * 2 + engine.accumulation / 2
        return [
            Transfer("all_gather", int(passes * work.discriminator_parameters.total * engine.width)),
            Transfer("reduce_scatter", steps * engine.accumulation * size),
        ]
    transfers = [Transfer("all_reduce", steps * engine.accumulation * size)]
    if engine.stage:
        transfers.append(
            Transfer("all_gather", steps * _aligned(count, work.num_gpus) * engine.width, is_overlapped=False)
        )
    return transfers


def _aligned(count: int, ranks: int) -> int:
    """Elements of a flat buffer under stages 1 and 2: a multiple of two per rank."""
    return -(-count // (2 * ranks)) * 2 * ranks


def _update(work: Workload) -> list[Transfer]:
    engine, updates = work.student, work.updates_per_rollout
    gradients = work.parameters.trained * engine.width
    if engine.stage < 3:
        transfers = [Transfer("all_reduce", updates * engine.accumulation * gradients)]
        if engine.stage:
            whole = _aligned(work.parameters.trained, work.num_gpus) * engine.width
            transfers.append(Transfer("all_gather", updates * whole, is_overlapped=False))
        return transfers
    once, passes = lagging_gathers(work)
    micro = engine.accumulation * (passes + _training_gathers(work))
    transfers = [
        Transfer("all_gather", updates * once * engine.width, is_overlapped=False),
        *_split_by_node(work, updates * micro * engine.width),
        Transfer("reduce_scatter", updates * engine.accumulation * gradients),
    ]
    return [transfer for transfer in transfers if transfer.size]


def lagging_gathers(work: Workload) -> tuple[int, int]:
    """Elements gathered for v_old and v_ref: (once per update, per micro batch)."""
    roles = work.has_old_pass + work.has_prior_pass
    if work.lagging_beside:
        return 0, 0
    if work.gathers_once:
        return roles * work.weights, 0
    return 0, roles * forward_gather(work)


def forward_gather(work: Workload) -> int:
    """Elements gathered in one forward: every weight, the patch embedding's bias twice (clean, then noisy patches)."""
    return work.weights + work.shape.dim


def _training_gathers(work: Workload) -> int:
    """Elements gathered in one forward and backward. Blocks are gathered again to be recomputed; frozen embedders of
    time and text have no backward."""
    count, twin = work.parameters, work.weights - work.parameters.total
    backward = work.weights - (_embedders(work.shape) if work.lora.rank else 0)
    blocks = count.num_layers * (count.block + count.adapter) + twin
    return forward_gather(work) + backward + (blocks if work.is_checkpointed else 0)


def _embedders(shape: StudentShape) -> int:
    """Parameters of the time and text embedders; the time projection's weight is gathered with the root module."""
    dim = shape.dim
    time = shape.freq_dim * dim + dim + dim * dim + dim + 6 * dim
    return time + shape.text_dim * dim + dim + dim * dim + dim


def _split_by_node(work: Workload, size: int) -> list[Transfer]:
    """With hpZ one gather per update, the first, crosses nodes; frozen weights never do after the first step."""
    if work.student.hpz == 1:
        return [Transfer("all_gather", size)]
    trained = work.parameters.trained if work.lora.rank else work.weights
    crossing = min(size, work.updates_per_rollout * trained * work.student.width)
    return [Transfer("all_gather", crossing), Transfer("all_gather", size - crossing, in_node=True)]
