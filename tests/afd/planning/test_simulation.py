"""The simulator: equal to the plain prediction where nothing can wait, and monotone where something can."""

from dataclasses import replace
from pathlib import Path

import pytest

from afd.config_file import load_config
from afd.planning.communication import plan_transfers
from afd.planning.hardware import GPUS, INTERCONNECTS
from afd.planning.plan import Machine, make_plan, planned_shape
from afd.planning.simulation import Cluster, _walk, simulate
from afd.planning.workload import Workload
from afd.train.ds_config import load_ds_config

CONFIGS = Path(__file__).parents[3] / "configs"


def workload(gpus: int) -> Workload:
    config = load_config(CONFIGS / "wan_1_3b_self_forcing.yaml")
    names = ("zero3_h100.json", "zero2_discriminator_h100.json")
    student, discriminator = (load_ds_config(CONFIGS / name) | {"train_batch_size": 8 * gpus} for name in names)
    machine = Machine(GPUS["h100-80g"], INTERCONNECTS["ib-400"], gpus)
    return make_plan(config, planned_shape(config), (student, discriminator), machine).workload


def test_one_rank_waits_for_nobody() -> None:
    work = workload(1)
    found = simulate(work, Cluster(GPUS["h100-80g"], INTERCONNECTS["ib-400"]))
    assert found.waiting_s == 0
    assert found.network_s == 0
    assert found.seconds == pytest.approx(found.compute_s)


@pytest.mark.parametrize(
    ("compute", "network", "waits"),
    [
        (1.0, 0.5, 0.5),  # the first gather only: the others hide behind the block before
        (1.0, 2.0, 2.0 + 9 * 1.0),  # the network is the bottleneck
        (1.0, 0.0, 0.0),
    ],
)
def test_blocks_wait_for_what_the_network_cannot_hide(compute: float, network: float, waits: float) -> None:
    assert _walk(compute, network, 10) == pytest.approx(waits)


def test_a_slower_network_more_jitter_and_more_ranks_cost_time() -> None:
    gpu = GPUS["h100-80g"]
    slow, fast = (simulate(workload(64), Cluster(gpu, INTERCONNECTS[name])) for name in ("ethernet-100", "ib-400"))
    assert slow.seconds > fast.seconds
    calm = simulate(workload(64), Cluster(gpu, INTERCONNECTS["ib-400"], jitter=0.0))
    assert calm.waiting_s == 0
    assert calm.seconds < fast.seconds < simulate(workload(256), Cluster(gpu, INTERCONNECTS["ib-400"])).seconds


def test_the_host_costs_its_seconds_once_whatever_the_ranks() -> None:
    for gpus in (1, 64):
        plain = Cluster(GPUS["h100-80g"], INTERCONNECTS["ib-400"])
        found, slower = (simulate(workload(gpus), each) for each in (plain, replace(plain, host_s=0.5)))
        assert slower.seconds - found.seconds == pytest.approx(0.5)
        assert slower.phases == found.phases


def test_latency_is_paid_for_every_call_where_nothing_overlaps() -> None:
    work, late = workload(64), replace(INTERCONNECTS["ib-400"], latency=1e-3)
    soon = replace(late, latency=0.0)
    slow, fast = (simulate(work, Cluster(GPUS["h100-80g"], each, overlaps=False, jitter=0.0)) for each in (late, soon))
    calls = sum(each.calls for phase in plan_transfers(work).values() for each in phase)
    assert slow.network_s - fast.network_s == pytest.approx(calls * 1e-3 * 6)  # log2 of 64 ranks
    assert simulate(work, Cluster(GPUS["h100-80g"], late)).network_s < slow.network_s
