"""What cannot divide or fit: `afd plan` and the training command end with 2 and print the same sentence."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afd.cli import main as afd
from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights import save_student
from afd.planning.hardware import GPUS
from afd.train.launch import main as train

CONFIGS = Path(__file__).parents[3] / "configs"


@dataclass(frozen=True)
class Case:
    """A run that cannot be: overrides, lines of the student's JSON, ranks in all and on a node, bytes of a GPU."""

    sentence: str
    overrides: tuple[str, ...] = ()
    ds: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, int] = (2, 2)
    memory: int = 2**36


CASES = {
    "batch over ranks": Case(
        "train_batch_size 32 must be a multiple of gradient_accumulation_steps 1 * ranks 3 = 3", ranks=(3, 3)
    ),
    "groups over ranks": Case(
        "train_batch_size 32 must be a multiple of rollout.group_size 5 x 2 ranks", ("rollout.group_size=5",)
    ),
    "critic's batch": Case(
        "train_batch_size of dmd.ds_config must be 32 like the student's, got 64",
        ("objective=dmd", "dmd.ds_config=configs/zero3_h100.json"),
    ),
    "heads over ranks": Case(
        "sequence_parallel_size must divide the student's 4 heads, got 3", ds={"sequence_parallel_size": 3}
    ),
    "heads in the kernel": Case(
        "student.attention_impl triton takes head_dim [16, 32, 64, 128], got 24", ("student.attention_impl=triton",)
    ),
    "chunks": Case("video.num_frames must be 3 + a multiple of the student's chunk", ("video.num_frames=13",)),
    "patches": Case(
        "video.height and video.width must give latents divisible by the student's patch [2, 2], got latents 5 x 4",
        ("video.height=20",),
    ),
    "adapters": Case(
        "rollout.merge_adapters must be false without adapters (student.lora.rank = 0), got true",
        ("rollout.merge_adapters=true",),
    ),
    "nodes": Case("16 ranks must fill whole nodes of 12", ("rollout.group_size=2",), ranks=(16, 12)),
    "hpZ over nodes": Case(
        "zero_optimization.zero_hpz_partition_size must divide 2 ranks of a node and 4 ranks in all, got 4",
        ds={"zero_hpz_partition_size": 4},
        ranks=(4, 2),
    ),
    "memory": Case(" GiB per rank and h100-80g offers 0.0 (largest part: activations, ", memory=2**20),
}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    shape = StudentShape(num_layers=2, num_heads=4, head_dim=24, patch_size=(1, 2, 2))
    save_student(CausalStudent(shape), path, dtype=torch.float32, note={})
    return path


@pytest.fixture(autouse=True)
def nothing_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(CONFIGS.parent)


def error(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command printed before it ended with 2."""
    assert code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    return line


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_planning_and_start_up_refuse_with_the_same_sentence(
    case: Case, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, per_node = case.ranks
    ds = json.loads((CONFIGS / "zero3.json").read_text())
    hpz = {name: value for name, value in case.ds.items() if name.startswith("zero_")}
    ds |= {name: value for name, value in case.ds.items() if name not in hpz}
    ds["zero_optimization"] |= hpz
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(ds))
    given = ["--config", "configs/quickstart.yaml", "--ds_config", str(file)]
    given += [f"student.init_from={student}", f"output_dir={tmp_path / 'run'}", *case.overrides]

    monkeypatch.setitem(GPUS, "h100-80g", replace(GPUS["h100-80g"], memory=case.memory))
    planned = error(afd(["plan", "--gpus", str(ranks), "--gpus_per_node", str(per_node), *given]), capsys)

    card = SimpleNamespace(total_memory=case.memory)  # the same card in this machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "h100-80g")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    started = error(train(given), capsys)

    assert started == planned
    assert case.sentence in planned
    assert not (tmp_path / "run").exists(), "refused before anything was written"
