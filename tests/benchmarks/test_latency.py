"""The streaming benchmark as a command, on a machine without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark in a process of its own, without a GPU."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_configured_structure_streams_through_a_vae_of_wans_class(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "wan_1_3b_self_forcing.yaml")
    results = tmp_path / "latency.csv"
    done = run(
        *("--config", config, "--window", "6", "--sink", "3"),
        *("--chunks", "4", "--repeats", "1", "--results", str(results)),
    )
    assert done.returncode == 0, done.stderr
    assert "They say nothing about a GPU." in done.stdout
    (row,) = csv.DictReader(results.open())
    assert (row["size"], row["chunk_frames"], row["window_frames"], row["sink_frames"]) == (
        "tiny",
        "3",
        "6",
        "3",
    )
    assert 0 < float(row["fps"]) < float(row["fps_without_decoding"])
    assert float(row["first_chunk_s"]) > 0
    assert float(row["prompt_change_s"]) > 0


@pytest.mark.slow
def test_too_few_chunks_are_refused() -> None:
    done = run("--chunks", "3")
    assert done.returncode == 2
    assert "--chunks must be >= 4 and --repeats >= 1, got 3 and 3" in done.stderr
