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


ORIGIN = ("Some GPU", "abc", "torch 2", "2030-01-01")


def times(report, shape, stage, impl, ms, error=1e-3):
    return report.Row(shape, stage, impl, ms, ms, ms, 100 / ms, 0.5, 10.0, 1.0, error, 700.0, "", *ORIGIN)


def test_defaults_are_what_was_measured_on_every_shape_and_is_right(report):
    rows = [
        times(report, shape, stage, impl, factor * ms, error)
        for shape, factor in (("A teacher", 1), ("B teacher", 4))
        for stage, impl, ms, error in (
            ("forward+backward", "chunks:sdpa", 3.0, 1e-3),
            ("forward+backward", "triton:tma", 2.0, 4e-3),
            ("forward+backward", "triton:pointer", 1.0, 0.3),  # fast and wrong
            ("forward+backward", "varlen:torch", 1.0, math.nan),
            ("forward+backward", "flex_padded", 1.0, 1e-3),
            ("forward", "flex", 1.0, 1e-3),
        )
    ]
    rows += [times(report, "A teacher", "forward+backward", "chunks:cudnn", 0.1)]  # on one shape only
    rows += [times(report, "A plain", "forward+backward", "reference", 0.1)]
    rows += [
        times(report, "cached step", "forward", f"cached:{impl}", ms) for impl, ms in (("sdpa", 2.0), ("triton", 1.0))
    ]
    found = report.measured_defaults(rows, "Some GPU", 90, "bfloat16")
    assert [(row.operation, row.impl, row.median_ms) for row in found] == [
        ("block_causal_attention", "triton:tma", 4.0),
        ("block_causal_attention", "chunks:sdpa", 6.0),
        ("cached_attention", "triton", 1.0),
        ("cached_attention", "sdpa", 2.0),
    ]
    assert {(row.device, row.capability, row.dtype, row.commit) for row in found} == {
        ("Some GPU", 90, "bfloat16", "abc")
    }
    assert found[0].shapes == "A teacher; B teacher"


def test_new_defaults_replace_those_of_the_same_device_only(report, tmp_path):
    from afd_kernels.attention_defaults import DefaultRow, read_table

    path = tmp_path / "defaults.csv"
    path.write_text(",".join(DefaultRow.__dataclass_fields__) + "\n")

    def row(device, impl, ms):
        return DefaultRow(
            "cached_attention", device, 90, "bfloat16", impl, ms, "a; b", "abc", "torch 2, cuda 13", "2030-01-01"
        )

    report.write_defaults([row("B", "sdpa", 2.0), row("B", "triton", 1.0)], path)
    report.write_defaults([row("A", "flash3", 5.0)], path)
    assert read_table(path) == [row("A", "flash3", 5.0), row("B", "triton", 1.0), row("B", "sdpa", 2.0)]
    report.write_defaults([row("B", "flash2", 3.0)], path)
    assert read_table(path) == [row("A", "flash3", 5.0), row("B", "flash2", 3.0)]


@pytest.mark.slow
def test_the_command_writes_the_defaults_it_measured(tmp_path):
    from afd_kernels.attention_defaults import TABLE, read_table

    table = tmp_path / "defaults.csv"
    table.write_text(TABLE.read_text().splitlines()[0] + "\n")
    impls = ["--impl", "reference", "chunks:sdpa"]
    places = ["--results", str(tmp_path), "--write_defaults", "--defaults", str(table)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "attention.py"), *impls, *places]
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    rows = read_table(table)
    assert [(row.device, row.dtype, row.impl) for row in rows] == [
        ("cpu", "float32", "chunks:sdpa"),
        ("cpu", "float32", "reference"),
    ]
    result = subprocess.run(
        [*command, "--shapes", "smoke"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "--write_defaults must have the shapes wan or tiny, got smoke" in result.stderr


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
