"""Rows of distillation runs: whose numbers they are, and that the results file survives."""

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def distillation(on_path: None) -> Any:
    return importlib.import_module("distillation")


def a_finished_run(distillation: Any, output: Path, command: str) -> None:
    output.mkdir(parents=True)
    metrics = {name: {"mean": 0.5} for name in distillation.METRICS}
    (output / "evaluation.json").write_text(json.dumps(dict.fromkeys(("base", "student", "teacher"), metrics)))
    facts = {"command": command, "commit": "abc", "device": "cpu", "duration_s": 1.0}
    (output / "run.json").write_text(json.dumps(facts))
    (output / "metrics.jsonl").write_text("{}\n")


def test_a_finished_run_counts_for_its_own_command_alone(
    distillation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, output = tmp_path / "results.csv", tmp_path / "mine" / "seed_0"
    monkeypatch.setattr(distillation, "RESULTS", results)
    start = f"train.py --ds_config configs/zero3.json --config configs/quickstart.yaml --output_dir {output} seed=0"
    a_finished_run(distillation, output, start)
    arguments = ["distillation.py", "--label", "mine", "--seeds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert distillation.main() == 0
    assert [row["label"] for row in csv.DictReader(results.open())] == ["mine"]
    monkeypatch.setattr(sys, "argv", [*arguments, "objective=sft"])
    assert distillation.main() == 2
    assert "seed=0 objective=sft`: choose another --label" in capsys.readouterr().err
    assert len(list(csv.DictReader(results.open()))) == 1, "nothing was recorded under the new command"


def test_results_of_other_columns_are_kept(distillation: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    distillation.append_rows(path, [{"label": "a", "seed": 0, "old": 1}])
    before = path.read_text()
    with pytest.raises(ValueError, match="other columns"):
        distillation.append_rows(path, [{"label": "b", "seed": 0, "new": 1}])
    assert path.read_text() == before
