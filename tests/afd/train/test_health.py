"""The check before a run: one process here; two ranks and srun in tests/launch/slurm."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from afd.config import DataSection, RunConfig, TeacherSection
from afd.train import health
from afd.train.health import check_health

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, before or after."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def test_healthy_machine_says_what_it_measured(tmp_path: Path) -> None:
    lines = check_health(RunConfig(output_dir=tmp_path / "not" / "yet"), gpus_per_node=0)
    assert lines[0].startswith("all-reduce: 1 ranks, gloo, 16 MiB in ")
    assert lines[1].startswith("disk: ")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_every_problem_is_named_with_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 2**20))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(health.socket, "gethostname", lambda: "node7")
    missing = tmp_path / "none"
    config = RunConfig(
        output_dir=tmp_path,
        teacher=TeacherSection(kind="shards"),
        data=DataSection(train_shards=missing, heldout_shards=missing),
    )
    with pytest.raises(ValueError, match=r"node7: .* must have 1 GiB free, got 0\.00") as error:
        check_health(config, gpus_per_node=8)
    assert "node7: 8 GPUs expected, but torch sees no CUDA device" in str(error.value)
    assert f"node7: {missing} must be a folder of shards, got nothing there" in str(error.value)
