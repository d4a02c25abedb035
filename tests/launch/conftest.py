"""A run of seconds for the tests that start it on several nodes, and the same run on one machine to compare with."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights import save_student

ROOT = Path(__file__).parents[2]
NUM_STEPS = 24
"""Enough that the run still goes on when it is preempted after its first step."""


@dataclass(frozen=True)
class TinyRun:
    """Inputs of the run: a random student and two DeepSpeed JSONs for four rollouts a step."""

    inputs: Path

    @property
    def ds_config(self) -> Path:
        return self.inputs / "zero3.json"

    def overrides(self, num_steps: int = NUM_STEPS) -> tuple[str, ...]:
        knobs = {
            "student.init_from": self.inputs / "student.safetensors",
            "discriminator.ds_config": self.inputs / "zero2.json",
            "discriminator.warmup_steps": 1,
            "rollout.group_size": 2,
            "teacher.num_prompts": 8,
            "teacher.num_heldout_prompts": 2,
            "evaluation.every": 0,
            "evaluation.seeds_per_prompt": 1,
            "evaluation.num_samples": 1,
            "num_steps": num_steps,
            "checkpoint.every": 0,
            "tracking.mlflow": "false",
            "timeout_s": 120,
        }
        return tuple(f"{name}={value}" for name, value in knobs.items())

    def environment(self) -> dict[str, str]:
        """A user's shell: the environment's own programs first, nothing of a launcher."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": path}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The inputs, in a folder whose name a careless script would split."""
    folder = tmp_path_factory.mktemp("in 'puts'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = StudentShape(num_layers=1, num_heads=2, head_dim=12, ffn_dim=32, freq_dim=16)
        save_student(CausalStudent(shape), folder / "student.safetensors", dtype=torch.float32, note={})
    for stage in (2, 3):
        section = {
            "train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        (folder / f"zero{stage}.json").write_text(json.dumps(section))
    return TinyRun(folder)


@pytest.fixture(scope="session")
def whole(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs: two ranks on one machine, under torchrun."""
    output = tmp_path_factory.mktemp("whole") / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "launch/train.py",
    ]
    arguments = ["--ds_config", str(tiny.ds_config), "--output_dir", str(output), *tiny.overrides()]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def _rows_of(output: Path) -> list[dict[str, float]]:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time")} for line in lines]


@pytest.fixture(scope="session")
def rows_of() -> Any:
    """`rows_of(output)`: a run's metrics without what a clock measured."""
    return _rows_of


@pytest.fixture(scope="session")
def assert_same_run() -> Any:
    """`assert_same_run(output, whole)`: equal metrics, weights, averages and evaluation, bit by bit."""

    def check(output: Path, whole: Path) -> None:
        assert _rows_of(output) == _rows_of(whole)
        for name in ("student", "averages/old", "averages/ema", "averages/reference"):
            file = Path("checkpoints", f"step_{NUM_STEPS:08d}", f"{name}.safetensors")
            expected, got = load_file(whole / file), load_file(output / file)
            assert all(expected[key].equal(got[key]) for key in expected | got), name
        assert (output / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()

    return check
