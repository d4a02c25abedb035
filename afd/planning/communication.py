"""What every rank exchanges in a step: collectives by phase, their number and the bytes of the whole tensors.

The student's update depends on how v_old and v_ref are computed (`nft.velocities`). Bulk only: DeepSpeed's checks of
traces (when the order of modules changes, some 10 broadcasts, a few KB), norms and metrics (6 calls) are left out, and
so is the padding of tensors to a multiple of the ranks. Counted collectives of real two-rank steps are equal, bytes and
calls (test_measured.py), with prefetch off; with it DeepSpeed puts gathers together, and the calls are an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from afd.config import StudentShape
from afd.planning.parameters import student_tensors
from afd.planning.workload import EngineSettings, Workload

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]

# Modules outside the blocks with parameters of their own, each gathered alone: the root, patches, two linear layers of
# the time embedder and its projection, two linear layers of the text embedder, the head.
_OUTSIDE, _EMBEDDERS = 8, 5
_GATHER_BUCKET = 500_000_000  # elements of one gather after a step of stages 1 and 2: DeepSpeed's default


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in one phase of a step.

    Attributes:
        kind: what is done.
        size: bytes of the whole tensors, over all calls.
        calls: collectives that they are moved in.
        in_node: every one of them stays inside a node (hpZ).
        is_overlapped: runs beside the computation.
    """

    kind: Kind
    size: int
    calls: int
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


def total_calls(transfers: list[Transfer], kind: Kind) -> int:
    """Number of collectives of a kind."""
    return sum(transfer.calls for transfer in transfers if transfer.kind == kind)


def _rollout(work: Workload) -> list[Transfer]:
    if work.student.stage < 3:
        return []
    return [Transfer("all_gather", work.weights * work.student.width, _num_tensors(work), is_overlapped=False)]


def _num_tensors(work: Workload) -> int:
    """The student's parameters, each gathered alone where all are made whole at once."""
    tensors = student_tensors(work.shape, work.lora)
    adapters = len(tensors.adapter) * (2 if work.lagging_beside and work.has_old_pass else 1)
    outside = len(tensors.before) + len(tensors.after)
    return outside + work.shape.num_layers * (len(tensors.block) + adapters)


def _discriminator(work: Workload) -> list[Transfer]:
    """Under stage 3 a block is taken for one gather: exact on the student's backbone, too few for other kinds."""
    engine, count = work.discriminator, work.discriminator_parameters.trained
    if engine is None:
        return []
    size, steps = count * engine.width, work.discriminator_steps
    times = steps * engine.accumulation
    if engine.stage == 3:
        passes, parameters = times * 2 + engine.accumulation / 2, work.discriminator_parameters
        whole, modules = parameters.total * engine.width, parameters.num_layers + 1
        return [
            Transfer("all_gather", int(passes * whole), math.ceil(passes * modules)),
            Transfer("reduce_scatter", times * size, times * -(-count // engine.reduce_bucket)),
        ]
    transfers = [Transfer("all_reduce", times * size, times * -(-count // engine.reduce_bucket))]
    if engine.stage:
        transfers.append(_gather_after_step(count, engine, work.num_gpus, steps))
    return transfers


def _gather_after_step(count: int, engine: EngineSettings, ranks: int, steps: int) -> Transfer:
    """Stages 1 and 2: every rank's part of `count` updated weights to all ranks."""
    whole = _aligned(count, ranks)
    calls = max(1, whole // _GATHER_BUCKET)
    return Transfer("all_gather", steps * whole * engine.width, steps * calls, is_overlapped=False)


def _aligned(count: int, ranks: int) -> int:
    """Elements of a flat buffer under stages 1 and 2: a multiple of two per rank."""
    return -(-count // (2 * ranks)) * 2 * ranks


def _update(work: Workload) -> list[Transfer]:
    engine, updates = work.student, work.updates_per_rollout
    gradients, times = work.parameters.trained * engine.width, work.updates_per_rollout * engine.accumulation
    buckets = times * _num_buckets(work)
    if engine.stage < 3:
        transfers = [Transfer("all_reduce", times * gradients, buckets)]
        if engine.stage:
            transfers.append(_gather_after_step(work.parameters.trained, engine, work.num_gpus, updates))
        return transfers
    once, passes = lagging_gathers(work)
    roles = 0 if work.lagging_beside else work.has_old_pass + work.has_prior_pass
    apart = 0 if work.gathers_once else roles  # roles with passes of their own through the blocks
    micro = passes + _training_gathers(work)
    calls = apart * _forward_calls(work) + _training_calls(work)
    transfers = [
        Transfer(
            "all_gather",
            updates * once * engine.width,
            updates * (roles - apart) * _num_tensors(work),
            is_overlapped=False,
        ),
        *_split_by_node(work, times * micro * engine.width, times * calls),
        Transfer("reduce_scatter", times * gradients, buckets),
    ]
    return [transfer for transfer in transfers if transfer.size]


def _num_buckets(work: Workload) -> int:
    """Reductions of one backward: gradients are collected from the last block to the first until the next one would
    overflow the bucket."""
    tensors, layers = student_tensors(work.shape, work.lora), work.shape.num_layers
    whole = [*tensors.before, *tensors.block * layers, *tensors.after]
    sizes = tensors.adapter * layers if work.lora.rank else whole
    calls, held = 0, 0
    for size in reversed(sizes):
        if held and held + size > work.student.reduce_bucket:
            calls, held = calls + 1, 0
        held += size
    return calls + (held > 0)


def _forward_calls(work: Workload) -> int:
    """Gathers of one forward: a block at a time, and every module outside them; the patch embedding twice."""
    return work.shape.num_layers + _OUTSIDE + 1


def _training_calls(work: Workload) -> int:
    """Gathers of one forward and backward; see `_training_gathers`."""
    layers = work.shape.num_layers
    backward = layers + _OUTSIDE - (_EMBEDDERS if work.lora.rank else 0)
    return _forward_calls(work) + backward + (layers if work.is_checkpointed else 0)


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
    """Elements gathered in one forward and backward. Blocks are gathered again to be recomputed, and of them what is
    trained once more for their backward: DeepSpeed keeps the frozen weights in between. Frozen embedders of time and
    text have no backward."""
    count = work.parameters
    backward = work.weights - (_embedders(work.shape) if work.lora.rank else 0)
    again = count.num_layers * (count.adapter if work.lora.rank else count.block)
    return forward_gather(work) + backward + (again if work.is_checkpointed else 0)


def _embedders(shape: StudentShape) -> int:
    """Parameters of the time and text embedders; the time projection's weight is gathered with the root module."""
    dim = shape.dim
    time = shape.freq_dim * dim + dim + dim * dim + dim + 6 * dim
    return time + shape.text_dim * dim + dim + dim * dim + dim


def _split_by_node(work: Workload, size: int, calls: int) -> list[Transfer]:
    """With hpZ one gather per update, the first, crosses nodes; frozen weights never do after the first step."""
    engine = work.student
    if engine.hpz == 1:
        return [Transfer("all_gather", size, calls, is_overlapped=engine.prefetch > 0)]
    trained = work.parameters.trained if work.lora.rank else work.weights
    crossing = min(size, work.updates_per_rollout * trained * engine.width)
    first = min(calls, work.updates_per_rollout * _forward_calls(work))
    return [
        Transfer("all_gather", crossing, first, is_overlapped=engine.prefetch > 0),
        Transfer("all_gather", size - crossing, calls - first, in_node=True, is_overlapped=engine.prefetch > 0),
    ]
