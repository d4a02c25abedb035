"""What every rank exchanges in a step: collectives by phase, their number and the bytes of the whole tensors.

Phases have the names of the objective's own timers; AFD's scoring is part of `discriminator`. Of the mean step
(`afd.planning.passes`), rounded up to whole calls; of the longest one with `Workload.longest`. The student's update
depends on how v_old and v_ref are computed (`nft.velocities`). Bulk only: DeepSpeed's checks of traces (when the order
of modules changes, some 10 broadcasts, a few KB), norms and metrics (6 calls) are left out, and so is the padding of
the student's tensors to a multiple of the ranks. Counted collectives of real two-rank steps of every objective are
equal, bytes and calls (test_measured.py), with prefetch off; with it DeepSpeed puts gathers together, and the calls are
an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from afd.config import StudentShape
from afd.planning.workload import EngineSettings, Learner, Workload

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]

# Modules outside the blocks with parameters of their own, each gathered alone: the root, patches, two linear layers of
# the time embedder and its projection, two linear layers of the text embedder, the head.
_OUTSIDE, _EMBEDDERS = 8, 5
# Of a backbone discriminator: patches, three layers for times and two for prompts, and again the weights of the patches
# and of the times' projection; and modules of a head (two norms, four layers, the queries).
_BEFORE_HEADS, _HEAD_MODULES = 8, 7
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
    phases: dict[str, list[Transfer]] = {}
    if work.passes.num_times:
        phases["rollout"] = _rollout(work)
    if work.discriminator is not None:
        phases["discriminator"] = _discriminator(work, work.discriminator)
    if work.critic is not None:
        phases["critic"] = _optimizer_step(work, work.critic, passes=Fraction(0))
    phases["update"] = _update(work)
    return phases if work.num_gpus > 1 else {name: [] for name in phases}


def total_bytes(transfers: list[Transfer], kind: Kind) -> int:
    """Bytes of whole tensors in collectives of a kind."""
    return sum(transfer.size for transfer in transfers if transfer.kind == kind)


def total_calls(transfers: list[Transfer], kind: Kind) -> int:
    """Number of collectives of a kind."""
    return sum(transfer.calls for transfer in transfers if transfer.kind == kind)


def _rollout(work: Workload) -> list[Transfer]:
    return [_whole(work.learner)] if work.student.stage == 3 else []


def _whole(learner: Learner) -> Transfer:
    """All weights of a model made whole at once."""
    return Transfer("all_gather", learner.weights * learner.engine.width, learner.num_tensors, is_overlapped=False)


def _discriminator(work: Workload, engine: EngineSettings) -> list[Transfer]:
    passes, count = work.passes, work.discriminator_parameters.trained
    times, buckets = passes.discriminator_steps * engine.accumulation, -(-count // engine.reduce_bucket)
    if engine.stage == 3:
        forward, backward = _discriminator_gathers(work)
        forwards = times + passes.judges * engine.accumulation / 2  # scoring takes clips two micro batches at a time
        size, calls = (forwards * there + times * back for there, back in zip(forward, backward, strict=True))
        reduced = count if work.vlm is not None else _padded(work.discriminator_tensors[1], work.num_gpus)
        return [
            Transfer("all_gather", int(size * engine.width), math.ceil(calls)),
            Transfer("reduce_scatter", times * reduced * engine.width, times * buckets),
        ]
    transfers = [Transfer("all_reduce", times * count * engine.width, times * buckets)]
    if engine.stage:
        transfers.append(_gather_after_step(count, engine, work.num_gpus, passes.discriminator_steps))
    return transfers


def _discriminator_gathers(work: Workload) -> tuple[tuple[int, int], tuple[int, int]]:
    """(elements, calls) that a forward and a backward of the discriminator gather under stage 3.

    On the student's backbone nothing frozen has a backward, and the calls are exact; of the other kinds a block is
    taken for one gather, which is too few.
    """
    parameters = work.discriminator_parameters
    if work.backbone is None:
        whole = (parameters.total, parameters.num_layers + 1)
        return whole, whole
    frozen, heads = (_padded(each, work.num_gpus) for each in work.discriminator_tensors)
    shape, modules = work.shape, _HEAD_MODULES * len(work.backbone.taps(work.shape.num_layers))
    again = 6 * shape.dim**2 + shape.dim * shape.in_channels * math.prod(shape.patch_size)
    return (frozen + heads + again, parameters.num_layers + _BEFORE_HEADS + modules), (heads, modules)


def _padded(sizes: list[int], ranks: int) -> int:
    """Elements of tensors that are gathered one by one, each filled up to a multiple of the ranks."""
    return sum(-(-size // ranks) * ranks for size in sizes)


def _gather_after_step(count: int, engine: EngineSettings, ranks: int, steps: int) -> Transfer:
    """Stages 1 and 2: every rank's part of `count` updated weights to all ranks."""
    whole = _aligned(count, ranks)
    calls = max(1, whole // _GATHER_BUCKET)
    return Transfer("all_gather", steps * whole * engine.width, steps * calls, is_overlapped=False)


def _aligned(count: int, ranks: int) -> int:
    """Elements of a flat buffer under stages 1 and 2: a multiple of two per rank."""
    return -(-count // (2 * ranks)) * 2 * ranks


def _update(work: Workload) -> list[Transfer]:
    """All updates of the student in a step: what they gather at once, and their optimizer steps."""
    passes = work.passes
    apart = 0 if work.gathers_once else passes.lagging  # roles with passes of their own through the blocks
    whole = 0 if work.lagging_beside or work.student.stage < 3 else passes.lagging - apart
    transfers = [_whole(work.learner)] * whole + _optimizer_step(work, work.learner, passes=apart + passes.repeats)
    if passes.guide == "scores" and work.critic is not None and work.critic.engine.stage == 3:
        gathers = 2 * work.student.accumulation  # a micro batch: the critic's weights, then the real score's
        transfers += [_whole(work.critic)] * gathers
    if passes.guide == "discriminator" and work.discriminator is not None and work.discriminator.stage == 3:
        tensors = [size for part in work.discriminator_tensors for size in part]
        size = _padded(tensors, work.num_gpus) * work.discriminator.width
        transfers.append(Transfer("all_gather", size, len(tensors), is_overlapped=False))
    share = passes.updates * passes.update_share
    return [_times(each, share) for each in transfers if each.size]


def _times(transfer: Transfer, share: Fraction) -> Transfer:
    return replace(transfer, size=math.ceil(transfer.size * share), calls=math.ceil(transfer.calls * share))


def _optimizer_step(work: Workload, learner: Learner, *, passes: Fraction) -> list[Transfer]:
    """One optimizer step of a velocity model, with `passes` forwards without gradient before each one with."""
    engine, trained = learner.engine, learner.parameters.trained
    times, gradients = engine.accumulation, trained * engine.width
    buckets = times * _num_buckets(learner)
    if engine.stage < 3:
        transfers = [Transfer("all_reduce", times * gradients, buckets)]
        return [*transfers, _gather_after_step(trained, engine, work.num_gpus, 1)] if engine.stage else transfers
    size = times * (passes * forward_gather(learner) + _training_gathers(learner)) * engine.width
    calls = times * (passes * _forward_calls(learner) + _training_calls(learner))
    return [
        *_split_by_node(learner, math.ceil(size), math.ceil(calls)),
        Transfer("reduce_scatter", times * gradients, buckets),
    ]


def _num_buckets(learner: Learner) -> int:
    """Reductions of one backward: gradients are collected from the last block to the first until the next one would
    overflow the bucket."""
    tensors, layers = learner.tensors, learner.shape.num_layers
    whole = [*tensors.before, *tensors.block * layers, *tensors.after]
    sizes = tensors.adapter * layers if learner.lora.rank else whole
    calls, held = 0, 0
    for size in reversed(sizes):
        if held and held + size > learner.engine.reduce_bucket:
            calls, held = calls + 1, 0
        held += size
    return calls + (held > 0)


def _forward_calls(learner: Learner) -> int:
    """Gathers of one forward: a block at a time, and every module outside them; the patch embedding for each copy of
    the clip."""
    return learner.shape.num_layers + _OUTSIDE + learner.teacher_forcing


def _training_calls(learner: Learner) -> int:
    """Gathers of one forward and backward; see `_training_gathers`."""
    layers = learner.shape.num_layers
    backward = layers + _OUTSIDE - (_EMBEDDERS if learner.lora.rank else 0)
    return _forward_calls(learner) + backward + (layers if learner.is_checkpointed else 0)


def forward_gather(learner: Learner) -> int:
    """Elements gathered in one forward: every weight, the patch embedding's bias for clean and for noisy patches."""
    return learner.weights + learner.shape.dim * learner.teacher_forcing


def _training_gathers(learner: Learner) -> int:
    """Elements gathered in one forward and backward. Blocks are gathered again to be recomputed, and of them what is
    trained once more for their backward: DeepSpeed keeps the frozen weights in between. Frozen embedders of time and
    text have no backward."""
    count = learner.parameters
    backward = learner.weights - (_embedders(learner.shape) if learner.lora.rank else 0)
    again = count.num_layers * (count.adapter if learner.lora.rank else count.block)
    return forward_gather(learner) + backward + (again if learner.is_checkpointed else 0)


def _embedders(shape: StudentShape) -> int:
    """Parameters of the time and text embedders; the time projection's weight is gathered with the root module."""
    dim = shape.dim
    time = shape.freq_dim * dim + dim + dim * dim + dim + 6 * dim
    return time + shape.text_dim * dim + dim + dim * dim + dim


def _split_by_node(learner: Learner, size: int, calls: int) -> list[Transfer]:
    """With hpZ one gather per update, the first, crosses nodes; frozen weights never do after the first step."""
    engine = learner.engine
    if engine.hpz == 1:
        return [Transfer("all_gather", size, calls, is_overlapped=engine.prefetch > 0)]
    trained = learner.parameters.trained if learner.lora.rank else learner.weights
    crossing = min(size, trained * engine.width)
    first = min(calls, _forward_calls(learner))
    return [
        Transfer("all_gather", crossing, first, is_overlapped=engine.prefetch > 0),
        Transfer("all_gather", size - crossing, calls - first, in_node=True, is_overlapped=engine.prefetch > 0),
    ]
