"""Watching the judge: ranks by hand, and a real run whose scores are the truth."""

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def judge(on_path: None) -> Any:
    return importlib.import_module("judge")


def test_rank_correlation_is_spearmans(judge: Any) -> None:
    up = np.array([1.0, 2.0, 2.0, 3.0])
    assert judge.rank_correlation(up, np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.9**0.5)
    assert judge.rank_correlation(up, -(up**3)) == pytest.approx(-1.0)
    assert np.isnan(judge.rank_correlation(up, np.ones(4)))


def test_rows_are_means_by_number_of_balls(judge: Any) -> None:
    watch = judge.Watch(is_perfect=False, steps=[[(1, 0.5, 0.2), (2, float("nan"), 1.0)], [(1, 0.1, 0.4)]])
    first, second = watch.rows(2)
    assert (first["balls"], first["groups"], first["agreement"], first["gravity_error"]) == (
        1, 2, pytest.approx(0.3), pytest.approx(0.3),
    )  # fmt: skip
    assert (second["balls"], second["agreement"], second["gravity_error"]) == (2, "", 1.0)
    assert [row["first_step"] for row in watch.rows(1)] == [1, 1, 2]


@pytest.mark.slow
def test_a_perfect_judge_agrees_with_the_truth(judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = importlib.import_module("afd.train.objectives")
    scores: list[Any] = []
    weigh = objectives.weigh
    monkeypatch.setattr(objectives, "roll_out", objectives.roll_out)  # put back what `install` replaces
    monkeypatch.setattr(objectives, "score", objectives.score)
    monkeypatch.setattr(objectives, "weigh", lambda s, *a, **k: scores.append(s) or weigh(s, *a, **k))
    monkeypatch.setattr(judge, "RESULTS", tmp_path / "judge.csv")
    monkeypatch.chdir(FOLDER.parent)
    overrides = ["num_steps=2", "discriminator.warmup_steps=1", "teacher.num_prompts=8", "tracking.mlflow=false"]
    overrides += ["teacher.num_heldout_prompts=4", "evaluation.seeds_per_prompt=1", "evaluation.num_samples=1"]
    arguments = ["--label", "t", "--perfect", "--window", "1", "--output", str(tmp_path), *overrides]
    monkeypatch.setattr(sys, "argv", ["judge.py", *arguments])
    assert judge.main() == 0
    rows = list(csv.DictReader((tmp_path / "judge.csv").open()))
    for step in (1, 2):
        mine = [row for row in rows if int(row["first_step"]) == step]
        mean = sum(float(row["gravity_error"]) * int(row["groups"]) for row in mine) / 4
        assert -scores[step - 1].mean().item() == pytest.approx(mean, rel=1e-5)
