"""A whole run whose teacher goes on answering: killed once, resumed, on two ranks, without a step that waits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_run_takes_up_what_its_teacher_adds_and_resumes(tiny: Any, environment: dict[str, str]) -> None:
    live = {"enabled": "true", "samples_per_part": "2", "max_videos": "6", "check_every": "1", "max_wait_s": "120"}
    knobs = {f"teacher__live__{name}": value for name, value in live.items()} | {"num_steps": "6"}
    arguments = tiny.arguments(**knobs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "launch" / "train.py"), *arguments]
    log, metrics = tiny.output.parent / "log", tiny.output / "metrics.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        deadline = time.monotonic() + 600
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # both ranks stop at a boundary and commit
        process.wait(300)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from" in done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    counts = [row["live/samples"] for row in rows]
    assert counts == sorted(counts)
    assert counts[0] >= 2.0  # the first batch waited for the first part
    assert all(row["live/wait_s"] < 5.0 for row in rows)
    assert all(row["live/share"] == pytest.approx(row["live/samples"] / (row["live/samples"] + 8)) for row in rows)
    arrivals = [json.loads(line) for line in (tiny.output / "live_arrivals.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in arrivals] == list(range(7))  # one warm-up batch, six steps; none twice
    told = (tiny.output / "live.log").read_text()
    assert "Traceback" not in told
    assert "Fatal" not in told
