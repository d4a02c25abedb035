"""The study's CSV files, and the tables and verdicts made from their finished rows."""

from __future__ import annotations

import csv
import math
import os
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_rows import PRESETS, REGIMES, Preset, build_rows
from study_scores import ERRORS, METRICS, MOTION, QUALITY, SHARES, TOTALS, totals

_WRITING = threading.Lock()
COLUMNS = {
    "physics": ("physics_total", *ERRORS),
    "motion": MOTION,
    "general quality": ("general_total", *QUALITY, *SHARES),
    "three times as long": tuple(name for name in METRICS if name.startswith("long/")),
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, records: Sequence[Mapping[str, Any]], *, unique: str | None = None) -> None:
    """Append records and flush them to the disk; with `unique`, only those whose value in that column is new.

    Raises:
        ValueError: the file was written with other columns.
    """
    with _WRITING:
        old = read_rows(path)
        if old and list(old[0]) != list(records[0]):
            raise ValueError(f"{path} has other columns than this version writes: choose another --out")
        known = {row[unique] for row in old} if unique else set[str]()
        new = [record for record in records if unique is None or str(record[unique]) not in known]
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]))
            if not old:
                writer.writeheader()
            writer.writerows(new)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Cell:
    """One line of a table: the mean over seeds of everything.

    Attributes:
        table, family, label, cell, method: as in `study_rows.Row`.
        values: metric -> (mean, standard error; NaN for one seed, number of seeds).
    """

    table: str
    family: str
    label: str
    cell: str
    method: str
    values: dict[str, tuple[float, float, int]]

    def text(self, metric: str) -> str:
        """Mean +- standard error."""
        if metric not in self.values:
            return "-"
        mean, error, _ = self.values[metric]
        digits = 1 if metric in TOTALS else 3
        return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def collect(out: Path) -> list[Cell]:
    """Newest row of every id, averaged over seeds; totals are against the base row of the same family and cell. In the
    order in which the paper's preset lists them, whichever finished first."""
    records = list({record["id"]: record for record in read_rows(out / "rows.csv")}.values())
    teachers = {record["world"]: _numbers(record) for record in read_rows(out / "teachers.csv")}
    bases = {(r["family"], r["cell"]): _numbers(r) for r in records if r["method"] == "base"}
    groups: dict[tuple[str, str, str, str, str], list[dict[str, float]]] = {}
    for record in records:
        values, base = _numbers(record), bases.get((record["family"], record["cell"]))
        if base is not None:
            values |= totals(values, base, teachers[record["world"]])
        key = (record["table"], record["family"], record["label"], record["cell"], record["method"])
        groups.setdefault(key, []).append(values)
    lines = dict.fromkeys((row.table, row.family, row.label, row.cell) for row in build_rows(PRESETS["paper"]))
    rank = {line: number for number, line in enumerate(lines)}
    return [
        Cell(table, family, label, cell, method, _averaged(groups[table, family, label, cell, method]))
        for table, family, label, cell, method in sorted(groups, key=lambda key: rank.get(key[:4], len(rank)))
    ]


def _numbers(record: Mapping[str, str]) -> dict[str, float]:
    return {name: float(record[name]) for name in (*METRICS, "train_s", "total_s") if record.get(name)}


def _averaged(rows: list[dict[str, float]]) -> dict[str, tuple[float, float, int]]:
    result = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        numbers = [row[name] for row in rows if name in row and not math.isnan(row[name])]
        if numbers:
            error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else math.nan
            result[name] = (statistics.fmean(numbers), error, len(numbers))
    return result


def find(cells: Sequence[Cell], table: str, family: str, label: str, cell: str = "default") -> Cell | None:
    """One line, or None where it was not run."""
    wanted = (table, family, label, cell)
    return next((each for each in cells if (each.table, each.family, each.label, each.cell) == wanted), None)


def regime_lines(cells: Sequence[Cell], methods: Sequence[str]) -> list[tuple[str, str, dict[str, Cell]]]:
    """(axis, value, method -> line) of every regime that was run; the default one is the main table's."""
    lines = []
    for axis, values in REGIMES.items():
        for value, where in values.items():
            is_default = where == ("default", ())
            table, cell = ("main", "default") if is_default else ("regime", f"{axis} {value}")
            found = {name: find(cells, table, "chunk_wise", name, cell) for name in ("base", *methods)}
            present = {name: each for name, each in found.items() if each is not None}
            others = [key for key, other in values.items() if other != ("default", ())]
            has_axis = any(
                find(cells, "regime", "chunk_wise", name, f"{axis} {key}") for key in others for name in methods
            )
            if len(present) > 1 and has_axis:
                lines.append((axis, value, present))
    return lines


def best_of(cells: Mapping[str, Cell], metric: str, spread: Mapping[str, float] | None = None) -> str:
    """The method with the highest mean, and those within one combined standard error of it. Where there is one seed,
    the error is the `spread` of one run of that method, if known."""
    known = {name: each.values[metric] for name, each in cells.items() if metric in each.values}
    if not known:
        return "-"
    for name, (mean, error, seeds) in known.items():
        known[name] = (mean, (spread or {}).get(name, error) if seeds == 1 else error, seeds)
    first = max(known, key=lambda name: known[name][0])
    close = [name for name in known if name != first and _distance(known[first], known[name]) <= 1.0]
    return first + (f" (tied: {', '.join(close)})" if close else "")


def regime_table(cells: Sequence[Cell], methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the regime map: both totals of each method, and who is best on each."""
    head = [
        "regime",
        *(f"{method}: physics, general" for method in methods),
        "best on physics",
        "best on general quality",
    ]
    own = {name: find(cells, "main", "chunk_wise", name) for name in methods}
    spreads = {
        metric: {
            name: each.values[metric][1] * each.values[metric][2] ** 0.5
            for name, each in own.items()
            if each is not None and metric in each.values
        }
        for metric in TOTALS
    }
    rows = []
    for axis, value, found in regime_lines(cells, methods):
        texts = [", ".join(map(found[name].text, TOTALS)) if name in found else "-" for name in methods]
        rows.append([f"{axis}: {value}", *texts, *(best_of(found, metric, spreads[metric]) for metric in TOTALS)])
    return head, rows


def _distance(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Difference of two means in combined standard errors; infinite where neither has one."""
    error = math.hypot(*(0.0 if math.isnan(each[1]) else each[1] for each in (a, b)))
    return (a[0] - b[0]) / error if error else math.copysign(math.inf, a[0] - b[0]) if a[0] != b[0] else 0.0


def verdicts(cells: Sequence[Cell], preset: Preset) -> list[tuple[str, str]]:
    """What the paper says, and what these rows say to it: (claim, yes / no / not run with the numbers)."""
    lines = []
    for family in preset.families:
        rows = {name: find(cells, "main", family, name) for name in ("base", *preset.methods)}
        run = {name: each for name, each in rows.items() if each is not None}
        others = {name: each for name, each in run.items() if name not in ("afd", "base")}
        for claim, metric, against in (
            ("AFD is best or tied on physics", "physics_total", others),
            ("AFD moves at least as much as SFT, GAN and DMD", "dynamic_degree", others),
            ("AFD's general quality is not below the base's", "general_total", {"base": run.get("base")}),
        ):
            lines.append((f"{family}: {claim}", _answer(run.get("afd"), against, metric)))
        for label, claim in (
            ("frozen D", "a frozen discriminator is worse than one that learns"),
            ("terminal only", "weighting the last denoising step alone is worse than forward-process credit"),
        ):
            ablated = find(cells, "ablations", family, label)
            lines.append((f"{family}: {claim}", _answer(run.get("afd"), {label: ablated}, "physics_total", least=1.0)))
    return lines


def _answer(own: Cell | None, others: Mapping[str, Cell | None], metric: str, *, least: float = -1.0) -> str:
    """Whether `own` is above all others by at least `least` combined standard errors: -1 is higher or tied, 1 is higher
    and not tied. One seed decides nothing."""
    known = {name: each for name, each in others.items() if each is not None and metric in each.values}
    if own is None or metric not in own.values or not known:
        return "not run"
    holds = all(_distance(own.values[metric], each.values[metric]) >= least for each in known.values())
    seeds = own.values[metric][2]
    numbers = ", ".join(f"{name} {each.text(metric)}" for name, each in known.items())
    answer = "open (one seed, no error bar)" if seeds == 1 else "yes" if holds else "no"
    return f"{answer}: {metric} afd {own.text(metric)}; {numbers}"


def write_tables(out: Path, preset: Preset, choices: Mapping[tuple[str, str], Any]) -> str:
    """`tables.md` and `tables.csv` from the finished rows; returns the Markdown."""
    cells = collect(out)
    parts = ["## What the paper claims, and what these rows say", "| claim | here |", "|---|---|"]
    parts += [f"| {claim} | {answer} |" for claim, answer in verdicts(cells, preset)]
    if choices:
        parts += ["", "## Chosen by the search", "| family | method | learning rate | updates | average |"]
        parts += ["|---|---|---|---|---|"]
        parts += [
            f"| {family} | {method} | {each.learning_rate:g} | {each.updates} | {each.average} |"
            for (family, method), each in sorted(choices.items())
        ]
    for table in dict.fromkeys(cell.table for cell in cells if cell.table != "regime"):
        for heading, metrics in COLUMNS.items():
            parts += ["", f"## {table}: {heading}", f"| family | row | seeds | {' | '.join(metrics)} |"]
            parts.append("|---" * (len(metrics) + 3) + "|")
            for cell in (each for each in cells if each.table == table):
                seeds = max(each[2] for each in cell.values.values())
                parts.append(f"| {cell.family} | {cell.label} | {seeds} | {' | '.join(map(cell.text, metrics))} |")
    head, rows = regime_table(cells, preset.regime_methods)
    if rows:
        parts += ["", "## regime map (50 is the base of the same regime)", f"| {' | '.join(head)} |"]
        parts.append("|---" * len(head) + "|")
        parts += [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join(parts) + "\n"
    (out / "tables.md").write_text(text)
    _write_csv(out / "tables.csv", cells)
    return text


def _write_csv(path: Path, cells: Sequence[Cell]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "family", "label", "cell", "metric", "mean", "standard_error", "seeds"])
        for cell in cells:
            for metric, (mean, error, seeds) in cell.values.items():
                shown = "" if math.isnan(error) else f"{error:.6g}"
                row = [cell.table, cell.family, cell.label, cell.cell, metric, f"{mean:.6g}", shown, seeds]
                writer.writerow(row)
