"""The scaling benchmark's simulator: a line per point, a plot, and the assumptions said."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
