"""The simulator: equal to the plain prediction where nothing can wait, and monotone where something can."""

from pathlib import Path

import pytest

from afd.config_file import load_config
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
