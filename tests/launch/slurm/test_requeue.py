"""Who goes back into the queue, under a real Slurm: `make test-slurm`. The training command is replaced by a stand-in
that takes no time, so that only the scripts and Slurm are looked at."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afd.slurm import SlurmJob, render

pytestmark = pytest.mark.slurm

STAND_IN = """\
#!{python} -IS
import json, os, signal, sys, time
task, restarts = os.environ.get("SLURM_ARRAY_TASK_ID", "-"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
if os.environ["MODE"] == "heed":
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
with open({record!r}, "a") as file:
    file.write(json.dumps({{"task": task, "restarts": restarts, "argv": sys.argv[1:]}}) + "\\n")
if restarts:
    sys.exit(0)
if os.environ["MODE"] == "stop":
    sys.exit(75)
time.sleep(120)
"""


class Job:
    """One submitted job with the stand-in."""

    def __init__(self, cluster: Any, folder: Path, mode: str, **changes: Any) -> None:
        self.cluster, self.record = cluster, folder / f"{mode}.jsonl"
        stand_in = folder / mode
        stand_in.write_text(STAND_IN.format(python=sys.executable, record=str(self.record)))
        stand_in.chmod(0o755)
        values = {
            "name": mode,
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "cpus_per_rank": 1,
            "memory": None,
            "time": "10",
            "log_dir": str(folder),
            "workdir": str(folder),
            "python": str(stand_in),
            "output_dir": str(folder / "run"),
            "environment": {"MODE": mode},
            "health_check": False,
        }
        script = render(SlurmJob(**(values | changes)))
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, env=cluster.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        self.number, self.log = done.stdout.strip(), folder

    def starts(self) -> list[tuple[str, int]]:
        """(array task, restarts) of every start of the stand-in."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return sorted((row["task"], row["restarts"]) for row in map(json.loads, lines))

    def argv(self) -> list[list[str]]:
        return [json.loads(line)["argv"] for line in self.record.read_text().splitlines()]

    def states(self) -> set[str]:
        """States of the job, or of its array tasks."""
        lines = self.cluster.run("scontrol", "show", "-o", "job", self.number).splitlines()
        return {field.removeprefix("JobState=") for line in lines for field in line.split() if "JobState=" in field}

    def wait_for(self, is_there: Callable[[], bool], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_there():
            logs = "\n".join(log.read_text()[-2000:] for log in self.log.glob("*.log"))
            assert time.monotonic() < deadline, f"{self.states()} {self.starts()}\n{logs}\n{self.cluster.run('squeue')}"
            time.sleep(0.2)


def test_each_ending_has_its_own_consequence(cluster: Any, tmp_path: Path) -> None:
    """One time limit, one array, one cancellation, one preparation: side by side, because Slurm takes its time."""
    limited = Job(cluster, tmp_path, "heed", time="1", signal_lead_s=45)
    array = Job(cluster, tmp_path, "stop", kind="sweep", sweep=(("a='x y'",), ("b=$HOME",)))
    array.wait_for(lambda: array.starts() == [("0", 0), ("1", 0)] and array.states() == {"PENDING"})
    for task in ("0", "1"):
        cluster.start_again(f"{array.number}_{task}")
    array.wait_for(lambda: array.states() == {"COMPLETED"})
    assert array.starts() == [("0", 0), ("0", 1), ("1", 0), ("1", 1)], "each task was started once more, by itself"
    assert {tuple(argv[-2:]) for argv in array.argv()} == {
        ("a='x y'", f"output_dir={tmp_path}/run/0"),
        ("b=$HOME", f"output_dir={tmp_path}/run/1"),
    }

    cancelled = Job(cluster, tmp_path, "cancel")
    cancelled.wait_for(lambda: cancelled.starts() == [("-", 0)])
    cluster.run("scancel", cancelled.number)

    prepared = Job(cluster, tmp_path, "deaf", kind="prepare")
    prepared.wait_for(lambda: prepared.starts() == [("-", 0)])
    cluster.run("scancel", "--signal=TERM", prepared.number)  # to its steps, as a preemption does
    prepared.wait_for(lambda: prepared.states() == {"PENDING"})
    cluster.start_again(prepared.number)
    prepared.wait_for(lambda: prepared.states() == {"COMPLETED"})
    assert prepared.starts() == [("-", 0), ("-", 1)]

    limited.wait_for(lambda: limited.states() == {"PENDING"}, 90)
    cluster.start_again(limited.number)
    limited.wait_for(lambda: limited.states() == {"COMPLETED"})
    assert limited.starts() == [("-", 0), ("-", 1)]
    assert cancelled.states() == {"CANCELLED"}, "what a user cancels stays cancelled"
    assert cancelled.starts() == [("-", 0)]

    evaluated = Job(cluster, tmp_path, "evaluate", kind="evaluate", nodes=2, partition="scavenge")
    evaluated.wait_for(lambda: evaluated.starts() == [("-", 0), ("-", 0)])
    subprocess.run(
        ["sbatch", "-p", "urgent", "-N2", "--ntasks-per-node=2", "-o", "/dev/null", "--wrap", "true"],
        env=cluster.environment, check=True, capture_output=True,
    )  # fmt: skip
    evaluated.wait_for(lambda: evaluated.states() == {"PENDING"})
    cluster.run("scancel", evaluated.number)
