"""The scaling benchmark: calibrated on made-up runs and judged; its simulator's points, plot and assumptions."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afd.planning.simulation import simulate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling  # pyright: ignore[reportMissingImports]

    return scaling


def test_calibration_meets_the_one_rank_runs_and_predicts_between_them(scaling: Any) -> None:
    seconds = {8: [0.28] * 4, 32: [1.0] * 4}  # 0.04 s of host, 0.03 s a rollout
    network = scaling.gloo({"small": [1e-4] * 4, "large": [5e-4] * 4})
    assert network.latency == 1e-4
    cluster = scaling.calibrated(seconds, network, apart=0.0)
    for batch, expected in ((8, 0.28), (16, 0.52), (32, 1.0)):
        assert simulate(scaling.cpu_workload(batch, 1), cluster).seconds == pytest.approx(expected)
    two = simulate(scaling.cpu_workload(32, 2), cluster)
    calls = sum(each.calls for phase in scaling.plan_transfers(scaling.cpu_workload(32, 2)).values() for each in phase)
    moved = 4.952348e6 / 1.0485e6 * 4e-4  # as the timed gathers: a rank sent 1 MiB in 0.4 ms
    assert two.seconds == pytest.approx(0.52 + calls * 1e-4 + moved, rel=1e-3)


def test_the_runs_become_rows_a_verdict_and_a_page(
    scaling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scaling_runs  # pyright: ignore[reportMissingImports]

    def samples(*batches: int, share: float) -> dict[str, list[float]]:
        return {str(batch): [0.1 + 0.03 * batch * share] * 3 for batch in batches}

    phases = {name: [0.2] * 3 for name in (*scaling.PHASES, "score")}
    moved = {
        phase: {
            kind: [scaling.total_calls(each, kind), scaling.total_bytes(each, kind)] for kind in scaling.KINDS
        }
        for phase, each in scaling.plan_transfers(scaling.cpu_workload(32, 2)).items()
    }  # fmt: skip
    parts = {
        "first": {"seconds": {mode: samples(8, 32, share=1.0) for mode in ("alone", "pair")}},
        "second": {"seconds": {"pair": samples(8, 32, share=1.0)}},
        "rank 0": {
            "seconds": {"together": samples(32, 64, share=0.5)},
            "phases": {"32": phases, "64": phases},
            "moved": {"32": moved, "64": moved},
            "gather_s": {"small": [1e-4] * 3, "large": [5e-4] * 3},
        },
    }
    found = scaling_runs._put_together(parts)
    monkeypatch.setattr(scaling, "run", lambda rounds: found)
    rows, lines = scaling.measured_rows(3)
    assert [row.calls for row in rows] == [0, 397, 0, 397]
    assert scaling.verdict(rows).endswith(": validated within 15%")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    scaling.document(page, rows, lines)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old\n" not in text
    assert "| strong | 2 | 32 | 4.952348 | 4.952348 | 397 | 0.58 |" in text


def test_turns_are_taken_one_after_another(scaling: Any, tmp_path: Path) -> None:
    import scaling_runs  # pyright: ignore[reportMissingImports]

    waiting = {name: scaling_runs.turns(tmp_path, name, 1) for name in ("first", "second", "rank 0", "rank 1")}
    for turn in scaling_runs.TURNS:
        for name in scaling_runs.MEMBERS[turn[0]]:
            assert next(waiting[name])[1:] == turn
        for name in scaling_runs.MEMBERS[turn[0]]:
            index = scaling_runs.TURNS.index(turn)
            (tmp_path / f"{index} {name} done").touch()


def test_the_verdict_is_about_two_ranks_and_its_tolerance(scaling: Any) -> None:
    row = scaling.Row("measured", "", "strong", 2, 32, 1.0, 32.0, 1.0, 0.0, 0.0, 1.1, "", "")
    alone = replace(row, ranks=1, simulated_s=9.0)
    assert scaling.verdict([row, alone]) == "measured / simulated on two ranks: strong 0.91: validated within 15%"
    weak = replace(row, scaling="weak", simulated_s=0.8)
    assert scaling.verdict([row, weak]).endswith("strong 0.91, weak 1.25: NOT validated within 15%")
    assert scaling.verdict([alone]).startswith("NOT validated")


@pytest.mark.slow
def test_the_simulator_writes_its_points_and_says_what_it_assumes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--simulate", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "jitter=0.02" in done.stdout
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"simulated"}
    assert sorted({int(row["ranks"]) for row in rows}) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(0 < float(row["efficiency"]) <= 1.05 for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
