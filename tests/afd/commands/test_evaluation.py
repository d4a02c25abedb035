"""`afd evaluate`: where its numbers go, with the measuring itself replaced."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afd.cli import main
from afd.config import RunConfig
from afd.config_file import dump_config
from afd.distributed import World

SUMMARY = {"gravity_error": {"mean": 0.25, "sem": float("nan"), "n": 2}}


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit in a run's folder; reading it and measuring cost nothing."""
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(b"")
    (folder / "config.yaml").write_text(dump_config(RunConfig()))
    measuring = SimpleNamespace(evaluate=lambda student: SUMMARY, evaluate_teacher=lambda: SUMMARY)
    read = SimpleNamespace(to=lambda device: None)
    replaced: dict[str, Any] = {
        "afd.train.restore.load_commit": lambda path, average: (torch.nn.Identity(), None),
        "afd.data.loader.read_all": lambda *_, **__: None,
        "afd.data.loader.to_batch": lambda samples: read,
        "afd.distributed.init_world": lambda timeout_s: World(0, 0, 1, torch.device("cpu")),
        "afd.evaluation.heldout.HeldoutEvaluator": lambda *_: measuring,
        "afd.models.encoders.load_codec": lambda *_, **__: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(name, value)
    return folder


def test_a_relative_commit_is_measured_and_the_record_says_how(
    commit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(commit.parent)
    assert main(["evaluate", "--checkpoint", commit.name, "evaluation.max_prompts=2", "seed=3"]) == 0
    record = json.loads((commit.parents[1] / "evaluation-ema.json").read_text())
    assert record["overrides"] == ["evaluation.max_prompts=2", "seed=3"]
    assert (record["commit"], record["weights"]) == (commit.name, "ema")
    assert record["student"]["gravity_error"] == {"mean": 0.25, "sem": None, "n": 2}
    assert "gravity_error" in capsys.readouterr().out


def test_what_cannot_be_written_is_refused_before_measuring(
    commit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("afd.train.restore.load_commit", None)  # nothing may be loaded

    def refusal(out: Path) -> str:
        assert main(["evaluate", "--checkpoint", str(commit), "--out", str(out)]) == 2
        return capsys.readouterr().err

    assert refusal(tmp_path) == f"error: --out must be a JSON file to write, got the folder {tmp_path}\n"
    expected = "error: --out must be a file that can be written, in an existing folder, got {}\n"
    assert refusal(tmp_path / "no" / "a.json") == expected.format(tmp_path / "no" / "a.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refusal(tmp_path / "a.json") == expected.format(tmp_path / "a.json")


def test_numbers_are_shown_even_where_writing_fails(
    commit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["evaluate", "--checkpoint", str(commit)]) == 2
    captured = capsys.readouterr()
    assert "gravity_error" in captured.out
    assert "No space left on device" in captured.err
