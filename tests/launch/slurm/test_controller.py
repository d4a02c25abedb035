"""Rendered scripts under a real Slurm: `make test-slurm`. Two pretended nodes on this machine, gloo, no GPU."""

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

ROOT = Path(__file__).parents[3]


def job(tiny: Any, output: Path, **changes: Any) -> SlurmJob:
    values = {
        "name": output.name,
        "nodes": 2,
        "gpus_per_node": 0,
        "ranks_per_node": 1,
        "cpus_per_rank": 1,
        "memory": None,
        "time": "30",
        "partition": "scavenge",
        "log_dir": str(output.parent),
        "workdir": str(ROOT),
        "python": sys.executable,
        "output_dir": str(output),
        "ds_config": str(tiny.ds_config),
        "environment": {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        "overrides": (*tiny.overrides(), f"output_dir={output}"),
    }
    return SlurmJob(**(values | changes))


def submit(cluster: Any, script: str) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable"], input=script, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_until(is_there: Callable[[], object], cluster: Any, logs: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_there():
        if time.monotonic() > deadline:
            text = "\n".join(log.read_text()[-6000:] for log in sorted(logs.glob("*.log")))
            pytest.fail(f"nothing after {timeout_s} s\n{cluster.run('squeue')}\n{text}\n{cluster.logs()}")
        time.sleep(0.2)


def state_of(cluster: Any, job_id: str) -> str:
    return cluster.job(job_id)["JobState"]


def is_waiting(cluster: Any, job_id: str) -> bool:
    return state_of(cluster, job_id) == "PENDING" and cluster.job(job_id)["Restarts"] != "0"


def test_preempted_job_goes_back_and_ends_like_an_undisturbed_run(
    cluster: Any, tiny: Any, whole: Path, tmp_path: Path, rows_of: Any, assert_same_run: Any
) -> None:
    output = tmp_path / "srun"
    job_id = submit(cluster, render(job(tiny, output)))
    wait_until(lambda: rows_of(output), cluster, tmp_path)
    urgent = submit(cluster, "#!/bin/bash\n#SBATCH -p urgent -N 2 --ntasks-per-node=2 -o /dev/null\nsleep 1\n")
    wait_until(lambda: is_waiting(cluster, job_id), cluster, tmp_path)
    steps = len(rows_of(output))
    assert 1 <= steps < len(rows_of(whole))
    marker = json.loads((output / "stopped.json").read_text())
    assert (marker["exit_code"], marker["signal"], marker["step"]) == (75, "SIGTERM", steps)
    assert [commit.name for commit in (output / "checkpoints").glob("step_*")] == [f"step_{steps:08d}"]
    wait_until(lambda: state_of(cluster, urgent) == "COMPLETED", cluster, tmp_path)

    cluster.start_again(job_id)
    wait_until(lambda: state_of(cluster, job_id) == "COMPLETED", cluster, tmp_path)
    log = (tmp_path / f"srun-{job_id}.log").read_text()
    assert "start 1" in log, "the log of the first start is kept"
    assert "start 2" in log
    assert log.count("all-reduce: 2 ranks, gloo, 16 MiB") == 2
    assert f"at step {steps}" in log
    assert_same_run(output, whole)


@pytest.mark.parametrize(("kind", "name"), [("torchrun", "SIGUSR2"), ("single", "SIGTERM")])
def test_launchers_outlive_the_signal_and_their_exit_code_is_not_believed(
    cluster: Any, tiny: Any, tmp_path: Path, rows_of: Any, kind: Any, name: str
) -> None:
    output = tmp_path / kind
    described = job(tiny, output, kind=kind, nodes=1, ranks_per_node=2, health_check=False)
    job_id = submit(cluster, render(described))
    wait_until(lambda: rows_of(output), cluster, tmp_path)
    cluster.run("scancel", f"--signal={name[3:]}", job_id)  # to every process of the step, as ahead of the time limit
    wait_until(lambda: is_waiting(cluster, job_id), cluster, tmp_path)
    marker = json.loads((output / "stopped.json").read_text())
    assert (marker["exit_code"], marker["signal"], marker["step"]) == (75, name, len(rows_of(output)))
    assert "exit code 75: back into the queue" in (tmp_path / f"{kind}-{job_id}.log").read_text()
    cluster.run("scancel", job_id)


def test_deepspeeds_slurm_launcher_passes_a_failure_on(cluster: Any, tiny: Any, tmp_path: Path) -> None:
    """With wrong input, which needs no training: said once, and no requeue."""
    described = job(tiny, tmp_path / "deepspeed", kind="deepspeed", health_check=False)
    job_id = submit(cluster, render(described.model_copy(update={"ds_config": "/none.json"})))
    wait_until(lambda: state_of(cluster, job_id) == "FAILED", cluster, tmp_path)
    log = (tmp_path / f"deepspeed-{job_id}.log").read_text()
    assert log.count("error: DeepSpeed config /none.json does not exist") == 1, log
    # 143 where srun ended the second rank before it came to say the same.
    assert cluster.job(job_id)["ExitCode"] in ("2:0", "143:0")


def test_deepspeeds_slurm_launcher_trains_is_stopped_and_ends_like_an_undisturbed_run(
    cluster: Any, tiny: Any, whole: Path, tmp_path: Path, rows_of: Any, assert_same_run: Any
) -> None:
    output = tmp_path / "deepspeed"
    job_id = submit(cluster, render(job(tiny, output, kind="deepspeed", health_check=False)))
    wait_until(lambda: rows_of(output), cluster, tmp_path)
    cluster.run("scancel", "--signal=TERM", job_id)
    wait_until(lambda: is_waiting(cluster, job_id), cluster, tmp_path)
    assert json.loads((output / "stopped.json").read_text())["step"] == len(rows_of(output)) < len(rows_of(whole))
    cluster.start_again(job_id)
    wait_until(lambda: state_of(cluster, job_id) == "COMPLETED", cluster, tmp_path)
    assert "exit code 75: back into the queue" in (tmp_path / f"deepspeed-{job_id}.log").read_text()
    assert_same_run(output, whole)


def test_directives_arrive_as_they_were_said(cluster: Any, tiny: Any, tmp_path: Path) -> None:
    names = ["a b", "it's", 'say "x"', "back\\slash", "#no comment", "$(touch x)", "`x`;&|<>*?[]{}()~!", "é ü", "'"]
    for name in names:
        script = render(job(tiny, tmp_path / "run", name=name))
        job_id = submit(cluster, script.replace("#SBATCH --nodes", "#SBATCH --hold\n#SBATCH --nodes", 1))
        assert cluster.run("squeue", "--noheader", "--jobs", job_id, "--format=%j").rstrip("\n") == name
        cluster.run("scancel", job_id)
