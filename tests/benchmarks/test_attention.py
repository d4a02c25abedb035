"""The attention benchmark without a GPU: the report of a split run, and every line that a CPU can walk."""

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attention_report  # pyright: ignore[reportMissingImports]

    return attention_report


def test_a_split_run_makes_one_table_from_the_newest_rows(report, tmp_path):
    origin = ("Some GPU", "abc", "torch 2", "2030-01-01")

    def row(impl, ms, shape="teacher", stage="forward+backward"):
        return report.Row(shape, stage, impl, ms, ms, ms, 100 / ms, 0.5, 10.0, 1.0, 1e-3, 700.0, "", *origin)

    missing = replace(row("varlen", math.nan, stage="all"), note="not installed")
    report.append_rows([row("flex", 3.0), row("triton:tma", 4.0), missing], tmp_path)
    report.append_rows([row("triton:tma", 2.0), row("triton:tma", 1.0, stage="forward")], tmp_path)
    report.append_rows([row("chunks:sdpa", 1.5), row("chunks:sdpa", 9.0, shape="plain")], tmp_path)
    stem, table = report.write_report("Some GPU", tmp_path)
    assert stem == tmp_path / "some-gpu-attention"
    assert "| teacher | triton:tma | 1.000 | 50.0% | 2.000 | 50.0 | 50.0% | 1.50 | 0.75 |" in table
    assert "| plain | chunks:sdpa | - | - | 9.000 | 11.1 | 50.0% | - | 1.00 |" in table
    assert "- varlen not measured on teacher: not installed" in table
    assert table.endswith("over the teacher-forcing shapes: chunks:sdpa, triton:tma, flex.")
    assert stem.with_suffix(".md").read_text() == table + "\n"
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report.append_rows([row("varlen", 0.5)], tmp_path)
    assert "not measured" not in report.write_report("Some GPU", tmp_path)[1]


def test_a_table_of_other_columns_is_refused(report, tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("shape,ms\nx,1\n")
    with pytest.raises(ValueError, match=r"must have the columns .*, got \['shape', 'ms'\]; move it away"):
        report.read_rows(path)


@pytest.mark.slow
def test_the_whole_command_runs_in_the_interpreter(tmp_path):
    impls = ["chunks:sdpa", "triton:tma", "varlen:flash2", "cached:sdpa", "cached:triton"]
    command = [sys.executable, str(ROOT / "benchmarks" / "attention.py"), "--shapes", "smoke", "--impl", *impls]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command += ["--results", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "They say nothing about a GPU" in result.stdout
    (table,) = tmp_path.glob("*-attention.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_impl = {impl: [row for row in rows if row["impl"] == impl] for impl in impls}
    assert {impl: len(found) for impl, found in by_impl.items()} == dict(zip(impls, (2, 2, 1, 4, 4), strict=True))
    for row in rows:
        if row["impl"] == "varlen:flash2":
            assert "to install it" in row["note"]
        else:
            assert not row["note"]
            assert float(row["error"]) < 1e-5
            assert float(row["median_ms"]) > 0
