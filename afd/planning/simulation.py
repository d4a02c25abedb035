"""A step on many ranks, simulated: gathers and computation of every block as events, ranks that differ, waiting.

Refines `predict_step`: instead of one share of overlap, a phase's gathers are walked through on two queues
(computation, network) with one gathered ahead; every collective costs a latency that grows with the ranks; ranks are
slower or faster by chance, and each phase ends when the slowest is done. Assumptions are fields, and printed.
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
        host_s: seconds of a step's Python that no accelerator hides and that do not depend on the rollouts; 0 where
            the host runs ahead of the accelerator.
        overlaps: collectives run beside the computation, as NCCL's do on a stream of their own and gloo's do not.
        trials: steps averaged.
        seed: of the ranks' luck.
        assumed: efficiencies.
    """

    gpu: Gpu
    network: Interconnect
    gpus_per_node: int = GPUS_PER_NODE
    jitter: float = 0.02
    contention: float = 0.05
    host_s: float = 0.0
    overlaps: bool = True
    trials: int = 16
    seed: int = 0
    assumed: Efficiency = ASSUMED


@dataclass(frozen=True)
class Simulated:
    """Seconds of a simulated step.

    Attributes:
        seconds: mean over the trials.
        compute_s: of the average rank, no waiting; `Cluster.host_s` included.
        waiting_s: for the slowest rank.
        network_s: not hidden behind computation.
        phases: by name, without `Cluster.host_s`.
    """

    seconds: float
    compute_s: float
    waiting_s: float
    network_s: float
    phases: dict[str, float]


def simulate(work: Workload, cluster: Cluster) -> Simulated:
    """Simulate steps of a workload."""
    step = predict_step(
        work, cluster.gpu, cluster.network, gpus_per_node=cluster.gpus_per_node, assumed=cluster.assumed
    )
    network = compute = waiting = 0.0
    phases: dict[str, float] = {}
    luck = random.Random(cluster.seed)
    for name, phase in step.phases.items():
        exposed = _exposed(name, phase, work, cluster)
        slowest = phase.compute_s * _slowest(work.num_gpus, cluster, luck)
        own = phase.seconds - max(0.0, _plain_waits(name, phase, work, cluster))  # the optimizer's with it
        phases[name] = own + slowest + exposed
        network, compute, waiting = network + exposed, compute + own, waiting + slowest
    seconds = cluster.host_s + sum(phases.values())
    return Simulated(seconds, cluster.host_s + compute, waiting, network, phases)


def _slowest(ranks: int, cluster: Cluster, luck: random.Random) -> float:
    """How much longer than the average rank the slowest computes, relative; mean over the trials."""
    if ranks == 1:
        return 0.0
    draws = (max(luck.gauss(0.0, cluster.jitter) for _ in range(ranks)) for _ in range(cluster.trials))
    return sum(max(0.0, each) for each in draws) / cluster.trials


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
    clock = _clock(work, cluster)
    nodes = max(1, work.num_gpus // cluster.gpus_per_node)
    slower = 1.0 + cluster.contention * (nodes.bit_length() - 1)
    latency = cluster.network.latency * max(1, (work.num_gpus - 1).bit_length())
    hidden, exposed, calls = 0.0, 0.0, 0
    for transfer in plan_transfers(work)[name]:
        seconds = clock.transfer_seconds(transfer) * (1.0 if transfer.in_node else slower) + transfer.calls * latency
        if transfer.is_overlapped and cluster.overlaps:
            hidden, calls = hidden + seconds, calls + transfer.calls
        else:
            exposed += seconds
    return exposed + (_walk(phase.compute_s / calls, hidden / calls, calls) if calls else 0.0)


def _walk(compute: float, network: float, calls: int) -> float:
    """Seconds that `calls` blocks wait for their gathers: a block computes when it is whole and the one before it is
    done, and the network works on one block ahead."""
    network_free = computed = previous_start = 0.0
    for _ in range(calls):
        gathered = max(network_free, previous_start) + network
        start = max(computed, gathered)
        network_free, previous_start, computed = gathered, start, start + compute
    return computed - calls * compute
