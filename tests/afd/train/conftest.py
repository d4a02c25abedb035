"""A quick start small enough for a test: a random one-layer student, small DeepSpeed JSONs, eight teacher videos."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import afd
from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights import save_student

ROOT = Path(afd.__file__).parents[1]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ds_config(stage: int) -> dict[str, Any]:
    """A DeepSpeed JSON for 4 rollouts a step."""
    return {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def write_student(path: Path, *, num_layers: int = 1, seed: int = 0) -> Path:
    """A random student of 6k parameters per layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = StudentShape(num_layers=num_layers, num_heads=2, head_dim=12, ffn_dim=32, freq_dim=16)
        save_student(CausalStudent(shape), path, dtype=torch.float32, note={})
    return path


@dataclass(frozen=True)
class TinyRun:
    """Arguments of the training command for a run of seconds.

    Attributes:
        inputs: folder with student.safetensors, zero3.json, zero2.json.
        output: the run's folder; not made.
        knobs: dotted overrides.
    """

    inputs: Path
    output: Path
    knobs: dict[str, str] = field(default_factory=dict)

    def arguments(self, *flags: str, ds: str = "zero3.json", **knobs: str) -> list[str]:
        """The command line after the script; `rollout__group_size="2"` overrides `rollout.group_size`."""
        merged = self.knobs | {name.replace("__", "."): value for name, value in knobs.items()}
        overrides = [f"{name}={value}" for name, value in merged.items()]
        config = str(ROOT / "configs" / "chunk_wise.yaml")
        paths = ["--config", config, "--ds_config", str(self.inputs / ds), "--output_dir", str(self.output)]
        return [*paths, *flags, *overrides]

    def command(self, *flags: str, **knobs: str) -> list[str]:
        """The whole command as one plain process."""
        return [sys.executable, str(ROOT / "launch" / "train.py"), *self.arguments(*flags, **knobs)]


def run_environment() -> dict[str, str]:
    """The environment of a user's shell: no launcher's variables, the virtual environment's programs first."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return environment | {"OMP_NUM_THREADS": "1", "PATH": path}


def run_command(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user would, in the repository's root."""
    return subprocess.run(
        command, env=run_environment(), cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the student and the JSONs that all tiny runs share."""
    folder = tmp_path_factory.mktemp("inputs")
    write_student(folder / "student.safetensors")
    write_student(folder / "other.safetensors", num_layers=2)
    for stage in (2, 3):
        (folder / f"zero{stage}.json").write_text(json.dumps(ds_config(stage)))
    (folder / "odd.json").write_text(json.dumps(ds_config(3) | {"train_batch_size": 6}))
    return folder


@pytest.fixture(scope="session")
def tiny_knobs(tiny_inputs: Path) -> dict[str, str]:
    """Overrides of every tiny run."""
    return {
        "student.init_from": str(tiny_inputs / "student.safetensors"),
        "discriminator.ds_config": str(tiny_inputs / "zero2.json"),
        "discriminator.warmup_steps": "1",
        "discriminator.probe_pairs": "2",
        "discriminator.probe_every": "2",
        "rollout.group_size": "2",
        "teacher.num_prompts": "8",
        "teacher.num_heldout_prompts": "2",
        "evaluation.every": "2",
        "evaluation.seeds_per_prompt": "1",
        "evaluation.num_samples": "1",
        "num_steps": "4",
        "checkpoint.every": "1",
    }


@pytest.fixture
def tiny(tiny_inputs: Path, tiny_knobs: dict[str, str], tmp_path: Path) -> TinyRun:
    """A run of its own, not started."""
    return TinyRun(tiny_inputs, tmp_path / "run", tiny_knobs)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user's shell."""
    return run_environment()


@pytest.fixture(scope="session")
def run() -> Any:
    """`run(command)`: run a command as a user would, in the repository's root; returns the completed process."""
    return run_command
