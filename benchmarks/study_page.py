"""The study's one self-contained page: verdicts, tables, plots and contact sheets from the finished rows."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from study_rows import D_LR, Preset
from study_scores import TOTALS
from study_tables import COLUMNS, Cell, collect, find, regime_lines, regime_table, verdicts

from afd.evaluation.contact_sheet import contact_sheet

_COLOURS = {"base": "#8a93a5", "sft": "#c4860f", "gan": "#9b4dca", "dmd": "#1a8f5f", "afd": "#1868d6"}
_STYLE = """
:root { --ink: #20242c; --paper: #fafaf7; --line: #d8d8d2; --soft: #6b7280 }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; font-variant-numeric: tabular-nums; font-size: .86rem }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.words { text-align: left; white-space: normal }
.wide { overflow-x: auto } figure { margin: 1rem 0 } figcaption, small { color: var(--soft) }
img, svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px }
.yes { color: #14713f } .no { color: #b3261e } .not, .open { color: var(--soft) }
"""


def write_page(out: Path, preset: Preset, choices: Mapping[tuple[str, str], Any]) -> Path:
    """Write `study.html`; returns its path."""
    cells = collect(out)
    parts = [
        f"<h1>The study, preset {html.escape(preset.name)}</h1>",
        f"<p>Every row is one training run at {preset.rollouts} rollouts a step and at most {preset.steps} student "
        f"updates, measured once on {preset.heldout_prompts} held-out prompts. Totals: 50 is the base student of the "
        "same family and world, 100 is without fault. ± is the standard error over seeds.</p>",
        "<h2>What the paper claims, and what these rows say</h2>",
        _table(("claim", "here"), [(claim, answer) for claim, answer in verdicts(cells, preset)], is_words=True),
    ]
    if choices:
        rows = [
            (family, method, f"{each.learning_rate:g}", str(each.updates), each.average)
            for (family, method), each in sorted(choices.items())
        ]
        num_looks = len(preset.step_shares) * len(preset.averages)
        budget = f"{len(preset.learning_rates)} learning rates, {num_looks} looks each, training prompts"
        parts += [f"<h2>Chosen by the search ({budget})</h2>"]
        parts.append(_table(("family", "method", "learning rate", "updates", "average"), rows))
    for family in preset.families:
        parts += _family(out, preset, cells, family)
    for table in ("ablations", "d_lr", "beyond"):
        parts += _ablated(preset, cells, table)
    parts += _regime(out, preset, cells)
    path = out / "study.html"
    text = f"<!doctype html><html lang=en><meta charset=utf-8><title>AFD study</title><style>{_STYLE}</style>"
    path.write_text(text + "\n".join(parts) + "</html>\n")
    return path


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, is_words: bool = False) -> str:
    def cell(text: str) -> str:
        mark = text.replace(":", " ").split(" ", maxsplit=1)[0]
        mark = mark if mark in ("yes", "no", "not", "open") else ""
        return f"<td class='{'words ' if is_words else ''}{mark}'>{html.escape(text)}</td>"

    lines = ["<div class=wide><table><tr>", *(f"<th>{html.escape(name)}</th>" for name in head), "</tr>"]
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    return "".join([*lines, "</table></div>"])


def _lines(cells: Sequence[Cell], metrics: Sequence[str]) -> list[list[str]]:
    return [[cell.label, *(cell.text(metric) for metric in metrics)] for cell in cells]


def _family(out: Path, preset: Preset, cells: Sequence[Cell], family: str) -> list[str]:
    found = [find(cells, "main", family, name) for name in ("base", *preset.methods)]
    rows = [each for each in found if each is not None]
    if not rows:
        return []
    parts = [f"<h2>{html.escape(family)}: the methods</h2>"]
    for metric in ("physics_total", "general_total", "dynamic_degree"):
        parts.append(_bars(rows, metric))
    for heading, metrics in COLUMNS.items():
        parts += [f"<h3>{html.escape(heading)}</h3>", _table(("", *metrics), _lines(rows, metrics))]
    return [*parts, _sheet(out, preset, family)]


def _ablated(preset: Preset, cells: Sequence[Cell], table: str) -> list[str]:
    parts: list[str] = []
    metrics = ("physics_total", "general_total", "dynamic_degree", "gravity_error", "frechet", "sharpness")
    for family in preset.ablated_families:
        rows = [each for each in cells if each.table == table and each.family == family]
        reference = [find(cells, "main", family, name) for name in ("base", "afd")]
        if rows:
            every = [each for each in (*reference, *rows) if each is not None]
            parts += [
                f"<h2>{html.escape(family)}: {html.escape(table)}</h2>",
                _table(("", *metrics), _lines(every, metrics)),
            ]
        if table == "d_lr" and rows:
            scales = {0.0: find(cells, "ablations", family, "frozen D"), 1.0: reference[1]}
            scales |= {D_LR[row.label]: row for row in rows}
            parts.append(_learning_rates({scale: row for scale, row in sorted(scales.items()) if row is not None}))
    return parts


def _regime(out: Path, preset: Preset, cells: Sequence[Cell]) -> list[str]:
    """The map: where which method wins, on physics and on general quality; also written as `regime_map.png`."""
    lines, methods = regime_lines(cells, preset.regime_methods), preset.regime_methods
    if not lines:
        return []
    figure = Figure(figsize=(9.5, 0.36 * len(lines) + 1.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metric, title in ((left, TOTALS[0], "physics"), (right, TOTALS[1], "general quality")):
        grid = np.array([[f[m].values[metric][0] if m in f else math.nan for m in methods] for _, _, f in lines])
        image = axes.imshow(grid, cmap="PRGn", vmin=35, vmax=65, aspect="auto")
        axes.set_xticks(range(len(methods)), [method.upper() for method in methods])
        axes.tick_params(length=0)
        axes.set_frame_on(False)
        for i in range(1, len(lines)):
            if lines[i][0] != lines[i - 1][0]:
                axes.axhline(i - 0.5, color="white", linewidth=3)
        axes.set_yticks(range(len(lines)), [f"{axis}: {value}" for axis, value, _ in lines])
        axes.set_title(title)
        for (i, j), number in np.ndenumerate(grid):
            if not math.isnan(number):
                weight = "bold" if number == np.nanmax(grid[i]) else "normal"
                ink = "white" if abs(number - 50) > 8 else "black"
                axes.text(j, i, f"{number:.0f}", ha="center", va="center", weight=weight, color=ink)
    figure.colorbar(image, ax=[left, right], label="its base: 50", aspect=40)
    figure.savefig(out / "regime_map.png", dpi=120, metadata={"Software": None})
    note = "A method is tied with the best within one standard error; a regime with one seed has the default's spread."
    head, rows = regime_table(cells, methods)
    parts = ["<h2>Regime map: where which method wins</h2>", _svg(figure), _table(head, rows)]
    return [*parts, f"<p><small>{note}</small></p>"]


def _bars(rows: Sequence[Cell], metric: str) -> str:
    known = [row for row in rows if metric in row.values]
    figure = Figure(figsize=(5.2, 0.36 * len(known) + 0.7), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(known):
        mean, error, _ = row.values[metric]
        axes.barh(i, mean, xerr=None if math.isnan(error) else error, color=_COLOURS.get(row.label, "#555"))
    axes.set_yticks(range(len(known)), [row.label for row in known])
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _svg(figure)


def _learning_rates(rows: Mapping[float, Cell]) -> str:
    """Both totals over the discriminator's learning rate; 1 is the main table's."""
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for metric, line in zip(TOTALS, ("-", "--"), strict=True):
        numbers = [row.values[metric] for row in rows.values()]
        errors = [0.0 if math.isnan(error) else error for _, error, _ in numbers]
        means = [mean for mean, _, _ in numbers]
        axes.errorbar(range(len(rows)), means, yerr=errors, marker="o", ls=line, color=_COLOURS["afd"], label=metric)
    axes.set_xticks(range(len(rows)), [f"{scale:g}" for scale in rows])
    axes.set_xlabel("discriminator's learning rate, of the default")
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{text}</figure>"


def _sheet(out: Path, preset: Preset, family: str) -> str:
    """Teacher, base and every method on the same prompts and noise, first seed."""
    places = {"teacher": out / "clips" / "teacher" / "default.npz"}
    for name in ("base", *preset.methods):
        places[name] = out / "clips" / "main" / family / "default" / name / f"seed_{preset.seeds[0]}.npz"
    loaded = {name: np.load(path) for name, path in places.items() if path.is_file()}
    if "teacher" not in loaded:
        return ""
    rows = {
        f"{name}: {prompt}": clips["clips"][i]
        for i, prompt in enumerate(loaded["teacher"]["prompts"].tolist())
        for name, clips in loaded.items()
    }
    path = contact_sheet(rows, out / f"contact_sheet_{family}.png")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f"<img alt='contact sheet' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>Same prompts, same noise.</figcaption></figure>"
