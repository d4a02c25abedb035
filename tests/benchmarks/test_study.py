"""The study: its rows, its sums, and a whole micro preset that is stopped and goes on."""

import csv
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def parts(on_path: None) -> Any:
    """The study's modules, by name."""
    names = ("study_rows", "study_runs", "study_scores", "study_tables", "study_time")
    return type("Modules", (), {name: importlib.import_module(name) for name in names})


def test_every_row_comes_after_the_one_it_goes_on_from(parts: Any) -> None:
    for preset in parts.study_rows.PRESETS.values():
        rows = parts.study_rows.build_rows(preset)
        seen: set[str] = set()
        for row in rows:
            assert row.after is None or row.after in seen
            assert row.world in parts.study_rows.WORLDS
            seen.add(row.id)
        bases = {(row.family, row.cell) for row in rows if row.method == "base"}
        assert {(row.family, row.cell) for row in rows} == bases, "every cell has its base student"


def test_the_paper_preset_holds_what_was_asked_for(parts: Any) -> None:
    preset = parts.study_rows.PRESETS["paper"]
    rows = parts.study_rows.build_rows(preset)
    main = [row for row in rows if row.table == "main"]
    assert {row.family for row in main} == {"chunk_wise", "frame_wise"}
    assert {row.method for row in main} == {"base", "sft", "gan", "dmd", "afd"}
    assert preset.search_prompts + preset.validation_prompts == 200
    assert len(preset.seeds) >= 3
    assert {row.label for row in rows if row.table == "d_lr"} == {"low", "x2", "high"}, "0 is the ablation's frozen D"
    of_four = [row for row in rows if row.label.startswith("four steps")]
    assert {(row.family, row.cell) for row in of_four} == {("chunk_wise", "steps a chunk 4")}
    assert ("base", "steps a chunk 4") in {(row.method, row.cell) for row in rows}, "what they are compared with"
    assert len(preset.averages) > 1, "a slow average hides what a student learned last"
    searched = {(row.family, row.method) for row in parts.study_rows.search_rows(preset, rows)}
    assert searched == {(row.family, row.method) for row in main if row.method != "base"}, "one budget for all"


def test_a_part_of_the_study_searches_for_what_it_trains(parts: Any) -> None:
    def searched(name: str, only: tuple[str, ...], families: tuple[str, ...]) -> set[tuple[str, str]]:
        preset = parts.study_rows.PRESETS[name]
        rows = parts.study_rows.build_rows(preset, only, families)
        assert {row.family for row in rows} <= set(families)
        return {(row.family, row.method) for row in parts.study_rows.search_rows(preset, rows)}

    methods = ("sft", "gan", "dmd", "afd")
    assert searched("paper", ("main",), ("chunk_wise",)) == {("chunk_wise", method) for method in methods}
    assert searched("paper", ("d_lr",), ("chunk_wise", "frame_wise")) == {("chunk_wise", "afd")}
    assert searched("quick", ("main",), ("frame_wise",)) == {("chunk_wise", method) for method in methods}


def test_a_row_with_a_frozen_old_policy_is_not_measured_by_it(parts: Any, tmp_path: Path) -> None:
    runs, preset = parts.study_runs, parts.study_rows.PRESETS["paper"]
    study = runs.Study(preset, tmp_path, choices={("chunk_wise", "afd"): runs.Choice(6e-5, 240, "old")})
    rows = {row.label: row for row in parts.study_rows.build_rows(preset, ("ablations",), ("chunk_wise",))}
    frozen, moving = (runs.resolve(study, rows[label], ()) for label in ("off-policy", "current policy"))
    assert (frozen.choice.average, moving.choice.average) == ("ema", "old")
    of_averages = {each for each in frozen.training if each.startswith("averages.")}
    assert of_averages == {"averages.old_policy_decay=1", "averages.ema_decay=0.9"}
    assert not [each for each in moving.training if each.startswith("averages.")]


def test_totals_are_fifty_for_the_base_and_rise_as_faults_fall(parts: Any) -> None:
    totals = parts.study_scores.totals
    teacher = {"sharpness": 0.4}
    base = {"gravity_error": 0.6, "energy_error": 0.2, "sharpness": 0.3, "object_permanence": 0.8, "frechet": 5.0}
    assert totals(base, base, teacher) == {"physics_total": pytest.approx(50), "general_total": pytest.approx(50)}
    half = base | {"gravity_error": 0.3}
    expected = 100 * ((0.61 / (0.9 + 0.02)) + 0.5) / 2
    assert totals(half, base, teacher)["physics_total"] == pytest.approx(expected)
    too_sharp = base | {"sharpness": 0.5}
    assert totals(too_sharp, base, teacher)["general_total"] == pytest.approx(50), "as far from the teacher as before"
    assert totals(base | {"object_permanence": 1.0}, base, teacher)["general_total"] > 60
    assert math.isnan(totals({}, base, teacher)["physics_total"])


def row_of(seed: int, method: str, gravity_error: float, label: str | None = None) -> dict[str, Any]:
    named = {"table": "main", "family": "chunk_wise", "method": method, "label": label or method, "world": "default"}
    numbers = {"gravity_error": gravity_error, "dynamic_degree": 1.0, "sharpness": 0.4}
    return {"id": f"{label or method}/{seed}", **named, "cell": "default", "seed": seed, **numbers}


def test_means_errors_and_verdicts_over_seeds(parts: Any, tmp_path: Path) -> None:
    tables, preset = parts.study_tables, parts.study_rows.PRESETS["paper"]
    rows = [row_of(0, "base", 0.6)]
    rows += [row_of(seed, "afd", value) for seed, value in enumerate((0.30, 0.34, 0.32))]
    rows += [row_of(seed, "sft", value) for seed, value in enumerate((0.50, 0.52, 0.54))]
    for label, values in (("frozen D", (0.33, 0.31, 0.34)), ("terminal only", (0.41, 0.44, 0.42))):
        rows += [row_of(seed, "afd", value, label) | {"table": "ablations"} for seed, value in enumerate(values)]
    tables.append_rows(tmp_path / "rows.csv", rows)
    tables.append_rows(tmp_path / "teachers.csv", [{"world": "default", "sharpness": 0.42}])
    cells = tables.collect(tmp_path)
    afd = tables.find(cells, "main", "chunk_wise", "afd")
    assert afd.values["gravity_error"] == (pytest.approx(0.32), pytest.approx(0.02 / 3**0.5), 3)
    answers = dict(tables.verdicts(cells, preset))
    assert answers["chunk_wise: AFD is best or tied on physics"].startswith("yes: physics_total afd")
    assert answers["chunk_wise: a frozen discriminator is worse than one that learns"].startswith("no: "), "a tie"
    worse = "chunk_wise: weighting the last denoising step alone is worse than forward-process credit"
    assert answers[worse].startswith("yes: ")
    assert answers["frame_wise: AFD is best or tied on physics"] == "not run"
    assert tables.best_of({each.label: each for each in cells if each.table == "main"}, "physics_total") == "afd"


def test_one_seed_is_compared_with_the_spread_of_the_default_regime(parts: Any, tmp_path: Path) -> None:
    tables = parts.study_tables
    rows = [row_of(0, "base", 0.6)]
    rows += [row_of(seed, "afd", value) for seed, value in enumerate((0.30, 0.34, 0.32))]
    rows += [row_of(seed, "sft", value) for seed, value in enumerate((0.50, 0.52, 0.54))]
    there = {"table": "regime", "cell": "teacher videos 20"}
    for method, value in (("base", 0.6), ("afd", 0.31), ("sft", 0.30)):
        row = row_of(0, method, value) | there
        rows.append(row | {"id": f"regime/{row['id']}"})
    tables.append_rows(tmp_path / "rows.csv", rows)
    tables.append_rows(tmp_path / "teachers.csv", [{"world": "default", "sharpness": 0.42}])
    head, lines = tables.regime_table(tables.collect(tmp_path), ("sft", "afd"))
    assert head[0] == "regime"
    best = {line[0]: line[-2] for line in lines}
    assert best == {"teacher videos: 20": "sft (tied: afd)", "teacher videos: 200": "afd"}


def test_rows_are_appended_once_and_never_under_other_columns(parts: Any, tmp_path: Path) -> None:
    tables, path = parts.study_tables, tmp_path / "rows.csv"
    for _ in range(2):
        tables.append_rows(path, [{"world": "default", "x": 1}], unique="world")
    assert tables.read_rows(path) == [{"world": "default", "x": "1"}]
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        tables.append_rows(path, [{"world": "default", "y": 1}])


def test_estimates_follow_what_rows_took(parts: Any) -> None:
    preset = parts.study_rows.PRESETS["quick"]
    clock = parts.study_time.Clock(preset)
    row = parts.study_rows.Row("main", "chunk_wise", "afd", "afd", 0)
    before = clock.seconds(row)
    clock.note(row, preset.steps, 3 * before)
    assert clock.seconds(row) == pytest.approx(3 * before)
    clock.note(row, preset.steps, 0.2)
    assert clock.seconds(row) == pytest.approx(3 * before), "a row that was there already says nothing"
    assert parts.study_time.in_words(600) == "10 min"


def test_estimates_are_longer_on_a_slower_machine(parts: Any) -> None:
    times, row = parts.study_time, parts.study_rows.Row("main", "chunk_wise", "afd", "afd", 0)
    here, slower = (times.Clock(parts.study_rows.PRESETS["paper"], slowness=each).seconds(row) for each in (1, 3))
    assert slower - times.START_S == pytest.approx(3 * (here - times.START_S))
    assert times.pass_seconds("cpu") > 0


def start(out: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / "study.py"), "--preset", "micro", "--out", str(out), "--jobs", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_no_jobs_at_a_time_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parts: Any
) -> None:
    study = importlib.import_module("study")
    for jobs in ("-1", "0"):
        monkeypatch.setattr(sys, "argv", ["study.py", "--dry_run", f"--jobs={jobs}"])
        with pytest.raises(SystemExit, match="2"):
            study.main()
        assert f"argument --jobs: must be an integer >= 1, got '{jobs}'" in capsys.readouterr().err


def test_a_pattern_picks_rows_and_one_that_fits_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parts: Any
) -> None:
    study = importlib.import_module("study")
    monkeypatch.chdir(ROOT)

    def planned(*patterns: str) -> tuple[int, str]:
        arguments = ["--preset", "paper", "--dry_run", "--match", *patterns]
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
        code = study.main()
        texts = capsys.readouterr()
        return code, texts.err if code else texts.out

    code, text = planned("*/chunk_wise/*/terminal_only/*", "main/*/base/*")
    ids = [line.partition(":")[0] for line in text.splitlines() if "/seed_" in line]
    assert code == 0
    expected = [f"main/{family}/default/base/seed_0" for family in ("chunk_wise", "frame_wise")]
    expected += [f"ablations/chunk_wise/default/terminal_only/seed_{seed}" for seed in range(3)]
    assert ids[-5:] == expected
    assert all(each.startswith("search/chunk_wise/default/afd_") for each in ids[:-5])
    assert planned("*/terminal/*") == (
        2, "error: --match must fit the id of a row (--dry_run shows them), got */terminal/*\n",
    )  # fmt: skip


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_ends_in_tables_and_a_page(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    first = start(tmp_path)
    deadline = time.monotonic() + 240
    while not rows.is_file() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate(timeout=240)
    assert first.returncode == 130, text
    before = rows.read_text()
    assert [row["label"] for row in csv.DictReader(before.splitlines())] == ["base"]
    second = start(tmp_path)
    text, _ = second.communicate(timeout=480)
    assert second.returncode == 0, text
    assert "search: 1 of 1 rows are there already" in text
    assert "rows: 1 of 2 rows are there already" in text
    assert rows.read_text().startswith(before), "a finished row is not run again"
    base, afd = csv.DictReader(rows.read_text().splitlines())
    looks = list(csv.DictReader((tmp_path / "search.csv").open()))
    assert [(row["step"], row["average"]) for row in looks] == [("2", "ema"), ("2", "old")]
    best = max(looks, key=lambda row: float(row["preference"]))
    assert (base["average"], afd["average"]) == ("", best["average"])
    assert (base["method"], afd["method"]) == ("base", "afd")
    for name in ("gravity_error", "frechet", "count_fidelity", "dynamic_degree", "long/gravity_error"):
        assert float(base[name]) != float(afd[name]) or name == "count_fidelity"
    assert (tmp_path / "tables.md").read_text() in text
    page = (tmp_path / "study.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the page needs nothing else"
