"""Starting worker scripts as real ranks, for the tests that need a process group."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import afd

ROOT = Path(afd.__file__).parents[1]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Launch = Callable[..., Any]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_worker(script: Path, *arguments: str, ranks: int = 1, launcher: str = "torchrun") -> str:
    """Run a worker script to its end and return what it printed; the test fails with that text if a rank fails.

    Args:
        script: the worker.
        arguments: passed on.
        ranks: number of processes.
        launcher: "torchrun", "deepspeed", or "plain" for one process without a launcher.
    """
    prefix = {
        "plain": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"],
        "deepspeed": [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)),
            *("--master_port", _free_port()),
        ],
    }[launcher]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [*prefix, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout[-4000:]}\n{done.stderr[:8000]}"
    return done.stdout


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch(script, *arguments, ranks=, launcher=)`: the JSON that rank 0 wrote to the worker's first argument."""

    def start(script: Path, *arguments: str, ranks: int = 1, launcher: str = "torchrun") -> Any:
        result = tmp_path_factory.mktemp(script.stem) / "result.json"
        run_worker(script, str(result), *arguments, ranks=ranks, launcher=launcher)
        return json.loads(result.read_text())

    return start
