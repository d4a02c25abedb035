"""Runs lane_checks/ in a process of its own: in Triton's interpreter on the CPU (lane 1), on a GPU (lane 3).

Triton decides at its first import whether kernels are interpreted, so the lane cannot share this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = sorted(Path(__file__).with_name("lane_checks").glob("check_*.py"))
ROOT = Path(__file__).parents[2]


def run_lane(*, is_interpreted: bool, marker: str, timeout_s: float) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1" if is_interpreted else "0"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, "--durations=8"]
    command += map(str, CHECKS)
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    sys.stdout.write(result.stdout)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout


def test_kernels_match_the_oracle_in_the_interpreter():
    run_lane(is_interpreted=True, marker="not slow and not gpu", timeout_s=1500)


@pytest.mark.slow
def test_every_shape_matches_the_oracle_in_the_interpreter():
    run_lane(is_interpreted=True, marker="slow and not gpu", timeout_s=1800)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_match_the_oracle_on_the_gpu():
    run_lane(is_interpreted=False, marker="gpu or not gpu", timeout_s=1800)
