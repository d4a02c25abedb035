"""Asked to stop, a run commits the step it is at and says so; the same command ends where an undisturbed run ends."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from afd.stopping import MARKER, STOPPED

pytestmark = pytest.mark.slow

WARMUP, STEPS = "30", "30"  # seconds of work: there is time for a signal on a fast machine too


def rows_of(file: Path) -> list[dict[str, float]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time")} for line in lines]


def stop_when(
    is_there: Callable[[str], bool], command: list[str], number: signal.Signals, environment: dict[str, str], log: Path
) -> int:
    """Start a run, signal it once its log says what `is_there` waits for, and return its exit code."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        deadline = time.monotonic() + 300
        while not is_there(log.read_text()):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(300)


def test_run_stopped_in_warm_up_and_in_training_ends_like_an_undisturbed_one(
    tiny: Any, run: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    knobs = {"discriminator__warmup_steps": WARMUP, "num_steps": STEPS, "checkpoint__every": "0"}
    knobs |= {"tracking__mlflow": "false", "evaluation__every": "0"}
    whole = type(tiny)(tiny.inputs, tmp_path / "whole", tiny.knobs)
    done = run(whole.command(**knobs))
    assert done.returncode == 0, done.stderr[-4000:]

    log, command = tmp_path / "log", tiny.command(**knobs)
    code = stop_when(
        lambda text: bool(re.search(r"warm-up: +[1-9]\d?%", text)), command, signal.SIGUSR2, environment, log
    )
    assert code == STOPPED, log.read_text()[-4000:]
    marker = json.loads((tiny.output / MARKER).read_text())
    assert (marker["exit_code"], marker["signal"], marker["step"]) == (STOPPED, "SIGUSR2", 0)
    assert [commit.name for commit in (tiny.output / "checkpoints").glob("step*")] == ["step_00000000"]
    assert 1 <= len(rows_of(tiny.output / "warmup.jsonl")) < int(WARMUP)

    metrics = tiny.output / "metrics.jsonl"
    code = stop_when(lambda text: bool(rows_of(metrics)), command, signal.SIGTERM, environment, log)
    assert code == STOPPED, log.read_text()[-4000:]
    assert "resumed from" in log.read_text()
    step = len(rows_of(metrics))
    assert 1 <= step < int(STEPS)
    assert json.loads((tiny.output / MARKER).read_text())["step"] == step

    done = run(command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"at step {step}" in done.stderr
    assert not (tiny.output / MARKER).exists()
    for name in ("metrics.jsonl", "warmup.jsonl"):
        assert rows_of(tiny.output / name) == rows_of(whole.output / name), name
    for name in ("student.safetensors", "averages/ema.safetensors", "averages/old.safetensors"):
        last = Path("checkpoints", f"step_{int(STEPS):08d}", name)
        expected, got = load_file(whole.output / last), load_file(tiny.output / last)
        assert all(expected[key].equal(got[key]) for key in expected | got), name
    assert (tiny.output / "evaluation.json").read_text() == (whole.output / "evaluation.json").read_text()
