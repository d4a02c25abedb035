"""Rows of the attention benchmark: the CSV they are appended to, and the table and plot made from all of a device's."""

import csv
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from measurement import CPU_WARNING, append_csv, describe_commit, describe_device, describe_versions

from afd_kernels.attention_defaults import DefaultRow, read_table

PADDED = "flex_padded"  # a baseline, not an implementation of ours
MAX_ERROR = 2e-2  # of bf16 against the chunk loop; what is further off does not become a default, however fast
BASELINES = ("flex", "chunks:sdpa")
STEP = "forward+backward"


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none (`note`, numbers NaN).

    Times in ms, FLOP/s in 1e12, memory in MiB; error is against the chunk loop, as a share of its largest value.
    """

    shape: str
    stage: str
    impl: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    useful_tflop_s: float
    share_of_matmul: float
    peak_mib: float
    first_call_s: float
    error: float
    matmul_tflop_s: float
    note: str
    device: str
    commit: str
    versions: str
    date: str


NUMBERS = {field.name for field in fields(Row) if field.type in (float, "float")}


def origin() -> tuple[str, str, str, str]:
    """Device, commit, versions and date of a row made now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return describe_device(device), describe_commit(), describe_versions(), time.strftime("%Y-%m-%d", time.gmtime())


def not_measured(shape: str, impl: str, reason: str) -> Row:
    """A row that says why an implementation has no numbers for a shape."""
    device, commit, versions, date = origin()
    nothing: dict[str, Any] = dict.fromkeys(NUMBERS, math.nan)
    note = " ".join(reason.split())[:200]
    return Row(
        shape=shape, stage="all", impl=impl, note=note, device=device, commit=commit, versions=versions, date=date,
        **nothing,
    )  # fmt: skip


def stem_of(device: str, folder: Path) -> Path:
    """Path of a device's results, without suffix."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + "-attention")


def append_rows(rows: Sequence[Row], folder: Path) -> None:
    """Append rows of one device to its CSV."""
    append_csv(stem_of(rows[0].device, folder).with_suffix(".csv"), [asdict(row) for row in rows])


def read_rows(path: Path) -> list[Row]:
    """The newest row of every (shape, stage, implementation), in the order they were first measured.

    Raises:
        ValueError: the columns are not a Row's.
    """
    names = [field.name for field in fields(Row)]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} must have the columns {names}, got {reader.fieldnames}; move it away")
        records: list[dict[str, Any]] = list(reader)
    for record in records:
        record.update({name: float(record[name]) for name in NUMBERS})
    newest: dict[tuple[str, str, str], Row] = {}
    for row in (Row(**record) for record in records):
        if row.stage == "all":
            for stage in ("forward", STEP):
                newest.pop((row.shape, stage, row.impl), None)
        else:
            newest.pop((row.shape, "all", row.impl), None)
        newest[row.shape, row.stage, row.impl] = row
    return list(newest.values())


def default_table(rows: Sequence[Row]) -> str:
    """Markdown: implementations per shape, speed-ups over the baselines, what is missing, the order that follows."""
    measured = {(row.shape, row.stage, row.impl): row for row in rows if not row.note}
    origins = dict.fromkeys((row.device, row.commit, row.versions, row.date) for row in rows)
    lines = [f"{device}, commit {commit}, {versions}, {date}" for device, commit, versions, date in origins]
    if any("cuda None" in versions for _, _, versions, _ in origins):
        lines.append(CPU_WARNING)
    columns = "forward ms | of matmul | forward + backward ms | useful TFLOP/s | of matmul | x flex | x chunk loop"
    lines += ["", f"| shape | implementation | {columns} |", "|" + "---|" * 9]
    by_shape: dict[str, dict[str, Row]] = {}
    for shape in dict.fromkeys(row.shape for row in rows):
        impls = dict.fromkeys(impl for name, _, impl in measured if name == shape)
        steps = {impl: measured[shape, STEP, impl] for impl in impls if (shape, STEP, impl) in measured}
        by_shape[shape] = steps
        for impl in sorted(impls, key=lambda impl: steps[impl].median_ms if impl in steps else math.inf):
            forward, step = measured.get((shape, "forward", impl)), steps.get(impl)
            ahead = f"{forward.median_ms:.3f} | {forward.share_of_matmul:.1%}" if forward else "- | -"
            both = (
                f"{step.median_ms:.3f} | {step.useful_tflop_s:.1f} | {step.share_of_matmul:.1%}"
                if step
                else "- | - | -"
            )
            gains = [f"{steps[b].median_ms / step.median_ms:.2f}" if step and b in steps else "-" for b in BASELINES]
            lines.append(f"| {shape} | {impl} | {ahead} | {both} | {' | '.join(gains)} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault((row.impl, row.note), []).append(row.shape)
    lines += ["", *(f"- {impl} not measured on {', '.join(at)}: {note}" for (impl, note), at in reasons.items())]
    return "\n".join([*lines, "", order_of(by_shape)])


def order_of(by_shape: dict[str, dict[str, Row]]) -> str:
    """The implementations measured on every teacher-forcing shape, fastest first."""
    order = ", ".join(mean_times({name: found for name, found in by_shape.items() if "teacher" in name}))
    return f"Order by geometric mean over the teacher-forcing shapes: {order or 'no common implementation'}."


def mean_times(by_shape: dict[str, dict[str, Row]]) -> dict[str, float]:
    """Geometric mean of the median ms per implementation that was measured on every shape, fastest first."""
    complete = set.intersection(*map(set, by_shape.values())) if by_shape else set()
    logs = {impl: [math.log(found[impl].median_ms) for found in by_shape.values()] for impl in complete}
    means = {impl: math.exp(math.fsum(values) / len(values)) for impl, values in logs.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def measured_defaults(rows: Sequence[Row], device: str, capability: int, dtype: str) -> list[DefaultRow]:
    """What a device's rows say about the defaults: teacher-forcing steps, and cached steps, by implementation.

    Args:
        rows: of one device.
        device: as the table of defaults calls it.
        capability: compute capability x 10; 0 for a CPU.
        dtype: of the measurements.
    """
    found = []
    for operation, stage, word in (
        ("block_causal_attention", STEP, "teacher"),
        ("cached_attention", "forward", "cached"),
    ):
        by_shape: dict[str, dict[str, Row]] = {}
        for row in rows:
            is_right = not row.note and row.error <= MAX_ERROR
            if row.stage == stage and word in row.shape and row.impl != PADDED and is_right:
                by_shape.setdefault(row.shape, {})[row.impl.removeprefix("cached:")] = row
        for impl, mean_ms in mean_times(by_shape).items():
            last = max((of_shape[impl] for of_shape in by_shape.values()), key=lambda row: row.date)
            origins = (last.commit, last.versions, last.date)
            shapes = "; ".join(by_shape)
            found.append(DefaultRow(operation, device, capability, dtype, impl, round(mean_ms, 4), shapes, *origins))
    return found


def write_defaults(measured: Sequence[DefaultRow], path: Path) -> None:
    """Put the measurements in the table of defaults, in place of the same operation's on the same device and dtype."""

    def subject(row: DefaultRow) -> tuple[str, str, str]:
        return row.operation, row.device, row.dtype

    new = {subject(row) for row in measured}
    kept = [row for row in read_table(path) if subject(row) not in new]
    rows = sorted([*kept, *measured], key=lambda row: (subject(row), row.median_ms))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(DefaultRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    temporary.replace(path)


def write_report(device: str, folder: Path) -> tuple[Path, str]:
    """Write table and plot of everything in a device's CSV; return their path without suffix, and the table."""
    stem = stem_of(device, folder)
    rows = read_rows(stem.with_suffix(".csv"))
    table = default_table(rows)
    stem.with_suffix(".md").write_text(table + "\n")
    measured = [row for row in rows if not row.note]
    if measured:
        plot(measured, stem.with_suffix(".png"))
    return stem, table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Useful FLOP/s per shape and implementation, the matmul ceiling as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((row.shape, row.stage) for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.16 * len(groups) * len(impls)), layout="constrained")
    height = 0.8 / len(impls)
    for index, impl in enumerate(impls):
        rates = {(row.shape, row.stage): row.useful_tflop_s for row in rows if row.impl == impl}
        places = [place + index * height for place, group in enumerate(groups) if group in rates]
        axes.barh(places, [rates[group] for group in groups if group in rates], height=height, label=impl)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], [" ".join(group) for group in groups])
    axes.axvline(max(row.matmul_tflop_s for row in rows), color="black", linewidth=0.8, label="matmul ceiling")
    axes.invert_yaxis()
    axes.set_xlabel("useful TFLOP/s")
    note = f"\n{CPU_WARNING}" if "cuda None" in rows[0].versions else ""
    axes.set_title(f"{rows[0].device}, commit {rows[0].commit}, {rows[0].versions}{note}", fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
