"""Whole runs of the objectives that ask no discriminator: resumed, and gone on from a commit that holds one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from afd.train.commit import commit_name, read_manifest

pytestmark = pytest.mark.slow

ENGINES = {"sft": {"student"}, "dmd": {"student", "critic"}}


def rows_of(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time")} for row in rows]


@pytest.fixture
def baseline(tiny: Any) -> Any:
    """`baseline(objective)`: a tiny run of it, not started."""

    def make(objective: str) -> Any:
        score = {"dmd.real_score": str(tiny.inputs / "other.safetensors"), "dmd.critic_steps": "2"}
        score["dmd.ds_config"] = str(tiny.inputs / "zero3.json")
        fewer = {"evaluation.every": "0", "evaluation.num_samples": "1", "tracking.mlflow": "false"}
        return replace(tiny, knobs=tiny.knobs | fewer | score | {"objective": objective})

    return make


@pytest.mark.parametrize("objective", ENGINES)
def test_run_without_a_discriminator_resumes_exactly(baseline: Any, run: Any, tmp_path: Path, objective: str) -> None:
    whole, stopped = (replace(baseline(objective), output=tmp_path / name) for name in ("whole", "stopped"))
    for each, steps in ((whole, "4"), (stopped, "3"), (stopped, "4")):
        done = run(each.command(num_steps=steps))
        assert done.returncode == 0, done.stderr[-6000:]
    rows = rows_of(whole.output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows == rows_of(stopped.output)
    assert not any(name.startswith("discriminator/") for row in rows for name in row)
    commits = [each.output / "checkpoints" / commit_name(4) for each in (whole, stopped)]
    for commit in commits:
        assert read_manifest(commit)["models"].keys() == ENGINES[objective]
        assert not (commit / "discriminator").exists()
    for name in ("student.safetensors", *(f"averages/{name}.safetensors" for name in ("old", "ema", "reference"))):
        expected, got = (load_file(commit / name) for commit in commits)
        assert all(expected[key].equal(got[key]) for key in expected), name
    assert (whole.output / "report.html").is_file()

    done = run(whole.command(num_steps="5", objective="afd"))
    assert done.returncode == 2
    assert f"holds a run with objective {objective}, not afd" in done.stderr.strip().splitlines()[-1]


def test_another_real_score_is_refused_and_the_run_stays_as_it_is(baseline: Any, run: Any) -> None:
    """Which models a run has is known only when its engines are built."""
    dmd = baseline("dmd")
    assert run(dmd.command(num_steps="1")).returncode == 0
    files = [dmd.output / name for name in ("config.yaml", "metrics.jsonl", "run.json", "evaluation.json")]
    before = [file.read_bytes() for file in files]
    other = dmd.knobs | {"dmd.real_score": str(dmd.inputs / "student.safetensors")}
    done = run(replace(dmd, knobs=other).command(num_steps="2"))
    assert done.returncode == 2
    assert "is a checkpoint of another critic" in done.stderr.strip().splitlines()[-1]
    assert [file.read_bytes() for file in files] == before


def test_a_commit_with_a_discriminator_goes_on_without_it(baseline: Any, run: Any) -> None:
    first, then = baseline("afd"), baseline("sft")
    for each, steps in ((first, "1"), (then, "2")):
        done = run(each.command(num_steps=steps))
        assert done.returncode == 0, done.stderr[-6000:]
    assert "resumed from" in done.stderr
    assert [row["step"] for row in rows_of(then.output)] == [1, 2]
    models = [read_manifest(then.output / "checkpoints" / commit_name(step))["models"].keys() for step in (1, 2)]
    assert models == [{"student", "discriminator"}, {"student"}]
