"""The process group under each launcher, the collectives, and the seeded generators."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.distributed import (
    LAUNCH_VARIABLES,
    _has_busy_threads,
    gather_cat,
    init_world,
    seeded_generator,
    threads_per_rank,
)

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module", params=[("plain", 1), ("torchrun", 2), ("deepspeed", 2)], ids=lambda each: each[0])
def collected(request: pytest.FixtureRequest, launch: Any) -> dict[str, Any]:
    launcher, ranks = request.param
    return launch(WORKER, ranks=ranks, launcher=launcher)


def test_world_and_collectives_under_each_launcher(collected: dict[str, Any]) -> None:
    two = collected["size"] == 2
    assert collected["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert collected["sum"] == ([3.0, 6.0] if two else [1.0, 2.0])
    assert collected["mean"] == ([1.5, 3.0] if two else [1.0, 2.0])
    assert collected["max"] == ([2.0, 4.0] if two else [1.0, 2.0])
    assert collected["value_after"] == [1.0, 2.0]
    assert collected["rows"] == [[0.0, 1.0, 2.0]] + ([[100.0, 101.0, 102.0], [103.0, 104.0, 105.0]] if two else [])
    assert collected["empty"] == [1 if two else 0, 3]
    assert collected["dtype"] == "torch.bfloat16"
    assert collected["objects"] == [{"rank": rank} for rank in range(collected["size"])]
    assert collected["broadcast"] == "from 0"


def test_silent_peer_is_given_up_after_the_timeout_in_groups_that_others_made(launch: Any) -> None:
    seen = launch(WORKER.with_name("timeout_worker.py"), ranks=2)
    assert 1.0 < seen["seconds"] < 20, "torch's own timeout is 1800 s"
    assert seen["problem"]


def test_ranks_with_different_plans_fail_instead_of_hanging(collected: dict[str, Any]) -> None:
    expected = "the step plan must be the same on every rank: rank 0 has ['rollout', 0], rank 1 ['rollout', 1]"
    assert collected["mismatch"] == (expected if collected["size"] == 2 else "")


def test_a_half_launched_process_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="set RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        init_world()


def test_a_plain_process_holds_its_port_before_anyone_reads_it_and_leaves_no_variables() -> None:
    script = """
import os, socket
from afd.distributed import _complete_environment, close_world, init_world
before = dict(os.environ)
store = _complete_environment()
with socket.socket() as other:
    assert other.connect_ex(("127.0.0.1", int(os.environ["MASTER_PORT"]))) == 0, "nobody listens"
del store
close_world()
for _ in range(2):
    assert init_world(60).size == 1
    assert os.environ["WORLD_SIZE"] == "1"
    close_world()
    assert dict(os.environ) == before
"""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="timeout_s must be > 0 seconds, got 0"):
        init_world(0)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        init_world(device="tpu")
    with pytest.raises(ValueError, match=r"gather_cat needs a tensor \[n, ...\], got a scalar"):
        gather_cat(torch.tensor(1.0))
    with pytest.raises(ValueError, match="at least one integer key"):
        seeded_generator()


def test_threads_share_the_cores_unless_the_user_chose() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank({}, 1) == cores
    assert threads_per_rank({"LOCAL_WORLD_SIZE": "2"}, 64) == max(1, cores // 2)
    assert threads_per_rank({}, 10 * cores) == 1
    assert threads_per_rank({"OMP_NUM_THREADS": "3"}, 2) is None
    # torchrun's own default is not the user's choice, any other number is.
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
    assert threads_per_rank({**torchrun, "OMP_NUM_THREADS": "1"}, 2) == max(1, cores // 2)
    assert threads_per_rank({**torchrun, "OMP_NUM_THREADS": "5"}, 2) is None


def test_seeded_generators_are_stable_and_distinct() -> None:
    def draw(*keys: int) -> list[float]:
        return torch.randn(4, generator=seeded_generator(*keys)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*keys)) for keys in [(1, 2), (2, 1), (12,), (1, 2, 0), (-1, 2), (2**70,)]}) == 6
    # Pinned: a resumed run on another machine must draw the same numbers.
    assert seeded_generator(0, 1).initial_seed() == PINNED_SEED


PINNED_SEED = 2024819301478721300


def test_threads_at_work_are_seen() -> None:
    # hashlib lets go of the interpreter, as gloo's workers do.
    worker = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"x", b"y", 3_000_000))
    worker.start()
    time.sleep(0.05)
    busy = [_has_busy_threads() for _ in range(3)]
    worker.join()
    assert all(busy)
