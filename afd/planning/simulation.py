"""A step on many ranks, simulated: gathers and computation of every block as events, ranks that differ, waiting.

Refines `predict_step`: instead of one share of overlap, the update's blocks are walked through on two queues
(computation, network) with one block gathered ahead; every collective costs a latency that grows with the ranks; ranks
are slower or faster by chance, and each phase ends when the slowest is done. Assumptions are fields, and printed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from afd.planning.communication import plan_transfers
from afd.planning.hardware import ASSUMED, GPUS_PER_NODE, Efficiency, Gpu, Interconnect
from afd.planning.timing import Clock, Phase, predict_step
from afd.planning.workload import Workload


@dataclass(frozen=True)
class Cluster:
    """Where a step is simulated.

    Attributes:
        gpu, network: accelerators and network.
        gpus_per_node: ranks of a node.
        jitter: standard deviation of a rank's computation time in a phase, relative.
        contention: how much slower the network is per doubling of the nodes, relative.
        trials: steps averaged.
        seed: of the ranks' luck.
        assumed: efficiencies.
    """

    gpu: Gpu
    network: Interconnect
    gpus_per_node: int = GPUS_PER_NODE
    jitter: float = 0.02
    contention: float = 0.05
    trials: int = 16
    seed: int = 0
    assumed: Efficiency = ASSUMED


@dataclass(frozen=True)
class Simulated:
    """Seconds of a simulated step.

    Attributes:
        seconds: mean over the trials.
        compute_s: of the average rank, no waiting.
        waiting_s: for the slowest rank.
        network_s: not hidden behind computation.
    """

    seconds: float
    compute_s: float
    waiting_s: float
    network_s: float


def simulate(work: Workload, cluster: Cluster) -> Simulated:
    """Simulate steps of a workload."""
    step = predict_step(
        work, cluster.gpu, cluster.network, gpus_per_node=cluster.gpus_per_node, assumed=cluster.assumed
    )
    ranks, exposed, compute = work.num_gpus, 0.0, 0.0
    slowest = 0.0
    luck = random.Random(cluster.seed)
    for name, phase in step.phases.items():
        exposed += _exposed(name, phase, work, cluster)
        compute += phase.compute_s
        draws = (
            max(luck.gauss(0.0, cluster.jitter) for _ in range(ranks)) if ranks > 1 else 0.0
            for _ in range(cluster.trials)
        )
        slowest += phase.compute_s * sum(max(0.0, each) for each in draws) / cluster.trials
    rest = sum(
        phase.seconds - phase.compute_s - max(0.0, _plain_waits(name, phase, work, cluster))
        for name, phase in step.phases.items()
    )
    return Simulated(compute + slowest + exposed + rest, compute + rest, slowest, exposed)


def _clock(work: Workload, cluster: Cluster) -> Clock:
    return Clock(work, cluster.gpu, cluster.network, cluster.gpus_per_node, cluster.assumed)


def _plain_waits(name: str, phase: Phase, work: Workload, cluster: Cluster) -> float:
    """What `predict_step` added for the network; the rest of a phase is the optimizer's."""
    transfers, clock = plan_transfers(work)[name], _clock(work, cluster)
    hidden = sum(clock.transfer_seconds(each) for each in transfers if each.is_overlapped)
    shown = sum(clock.transfer_seconds(each) for each in transfers if not each.is_overlapped)
    return shown + max(0.0, hidden - cluster.assumed.overlap * phase.compute_s)


def _exposed(name: str, phase: Phase, work: Workload, cluster: Cluster) -> float:
    """Seconds of a phase that the network adds to the computation."""
    if work.num_gpus == 1:
        return 0.0
    clock = _clock(work, cluster)
    nodes = max(1, work.num_gpus // cluster.gpus_per_node)
    slower = 1.0 + cluster.contention * (nodes.bit_length() - 1)
    total = exposed = 0.0
    for transfer in plan_transfers(work)[name]:
        seconds = clock.transfer_seconds(transfer) * (1.0 if transfer.in_node else slower)
        if transfer.is_overlapped:
            total += seconds
        else:
            exposed += seconds
    layers = work.shape.num_layers if name == "update" else 1
    passes = max(1, 2 * work.student.accumulation * work.updates_per_rollout) if name == "update" else 1
    calls = layers * passes
    latency = cluster.network.latency * max(1, (work.num_gpus - 1).bit_length())
    return exposed + _walk(phase.compute_s / calls, total / calls + latency, calls)


def _walk(compute: float, network: float, calls: int) -> float:
    """Seconds that `calls` blocks wait for their gathers: a block computes when it is whole and the one before it is
    done, and the network works on one block ahead."""
    network_free = computed = previous_start = 0.0
    for _ in range(calls):
        gathered = max(network_free, previous_start) + network
        start = max(computed, gathered)
        network_free, previous_start, computed = gathered, start, start + compute
    return computed - calls * compute
