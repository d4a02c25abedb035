"""Curves of a run as inline SVG: which metrics share a panel, how each panel is read, how it is drawn.

Colours are CSS variables of the report's page, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Series = tuple[np.ndarray, np.ndarray]
MAX_POINTS = 600
# Stand-ins that the SVG writer accepts; `_to_page_colours` swaps them for the page's CSS variables.
PAGE_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--grid)",
    "#010301": "var(--series-1)",
    "#010302": "var(--series-2)",
    "#010303": "var(--series-3)",
    "#010304": "var(--series-4)",
    "#010305": "var(--series-5)",
    "#010306": "var(--series-6)",
    "#010401": "var(--base)",
    "#010402": "var(--teacher)",
    "#010403": "var(--student)",
}
INK, GRID = "#010203", "#010204"
SERIES = [f"#01030{i}" for i in range(1, 7)]
BASE, TEACHER, STUDENT = "#010401", "#010402", "#010403"


@dataclass(frozen=True)
class Panel:
    """One drawing: metrics whose whole name matches one of `patterns`, and one sentence on how to read it."""

    title: str
    patterns: tuple[str, ...]
    how_to_read: str
    limits: tuple[float, float] | None = None
    reference: float | None = None


PANELS = (
    Panel(
        "Student loss",
        (r"student/loss", r"student/flow_error"),
        "The loss says little: at v = v_old its value does not depend on the weights. Look for jumps, not for descent.",
    ),
    Panel(
        "Discriminator loss",
        (r"discriminator/loss",),
        "ln 2 = 0.69 (dashed) is guessing; near 0 the discriminator has won and teaches nothing more.",
        reference=float(np.log(2)),
    ),
    Panel(
        "Discriminator accuracy",
        (r"discriminator/accuracy",),
        "Share of pairs with the teacher ranked first: 0.5 (dashed) is guessing; informative below about 0.95.",
        limits=(0.0, 1.02),
        reference=0.5,
    ),
    Panel(
        "Score margin",
        (r"discriminator/margin(_mean)?",),
        "Teacher's score minus the student's; shrinking while D still trains means that the student catches up.",
        reference=0.0,
    ),
    Panel(
        "Discriminator's calibration",
        (r"discriminator/calibration",),
        "Predicted probability minus accuracy: above 0 (dashed) is overconfident; label smoothing keeps it below.",
        reference=0.0,
    ),
    Panel(
        "Discriminator on its probe set",
        (r"discriminator/probe_.*",),
        "Clips that never change and that D never trains on. Drift 0 is a discriminator that stands still; a margin "
        "that falls is one that forgets the first student.",
        reference=0.0,
    ),
    Panel(
        "Scores",
        (r"rollout/score_(mean|std)", r"discriminator/(teacher|student)_score(_mean)?"),
        "What the discriminator gives the student's rollouts. D moves too, so compare with the margin, not over time.",
    ),
    Panel(
        "Optimality weights",
        (r"weight/(mean|std|min|max)",),
        "Mean stays near 0.5; the spread is the learning signal: a spread near 0 teaches nothing.",
    ),
    Panel(
        "Saturation and flat groups",
        (r".*(saturated|zero_std|zero_spread|clipped)_?(share|fraction)?",),
        "Share of weights at 0 or 1, and of prompt groups whose rollouts all score alike; both should stay low.",
    ),
    Panel(
        "Distance from old and first policy",
        (r"student/(old_deviation|prior)",),
        "Mean |v - v_old|² (zero by construction for the current policy) and |v - v_ref|²; steady is healthy.",
    ),
    Panel(
        "Sharpness and motion of rollouts",
        (r"(rollout|sample)/(sharpness|motion|dynamic_degree|temporal_.*|flicker.*)",),
        "Falling sharpness is the known failure of few-step students (progressive blur); falling motion is freezing.",
    ),
    Panel(
        "Gradient norms",
        (r"(student|discriminator)/grad_norm",),
        "Before clipping. Zero means that nothing is learned; spikes come before damage.",
    ),
    Panel("Learning rates", (r"(student|discriminator)/(lr|learning_rate)",), "What the optimizers really used."),
    Panel(
        "Time per step",
        (r"time/.*",),
        "Seconds of each part of a step; a rise over the run means a leak or a busy machine.",
    ),
)
HISTOGRAM = re.compile(r"(.*weight.*?)[/_](?:hist(?:ogram)?|bin)[/_]?(\d+)")


def series_of(records: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    """Turn journal records into {metric: (steps [T], values [T])}; of several values for a step the last counts."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "time_unix_s"):
                points.setdefault(name, {})[int(record["step"])] = float(value)
    return {
        name: (np.array(list(by_step)), np.array(list(by_step.values()), dtype=np.float64))
        for name, by_step in points.items()
    }


def draw_panel(series: Mapping[str, Series], panel: Panel) -> str:
    """Draw the given metrics into one SVG: the raw values faint, a running mean on top."""
    figure, axes = _axes()
    labels = _short_names(list(series))
    for i, (name, (steps, values)) in enumerate(series.items()):
        colour = SERIES[i % len(SERIES)]
        smooth = _running_mean(values)
        if len(values) > 20:
            axes.plot(*_thinned(steps, values), color=colour, linewidth=0.8, alpha=0.28)
        marker = "o" if len(values) < 20 else ""
        line = _thinned(steps, smooth if len(values) > 20 else values)
        axes.plot(*line, color=colour, linewidth=1.8, marker=marker, markersize=3, label=labels[name])
    if panel.reference is not None:
        axes.axhline(panel.reference, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5)
    limits = panel.limits or _limits_of_constants(list(series.values()))
    if limits is not None:
        axes.set_ylim(*limits)
    if len(series) > 1:
        _legend(axes, columns=min(3, len(series)))
    return _to_svg(figure, panel.title)


def draw_evaluation(title: str, series: Series, *, base: float, teacher: float) -> str:
    """Draw one evaluation metric over steps, with the base student's and the teacher's level as lines."""
    figure, axes = _axes()
    for level, colour, label in ((base, BASE, "base"), (teacher, TEACHER, "teacher")):
        if np.isfinite(level):
            axes.axhline(level, color=colour, linewidth=1.3, linestyle=(0, (4, 3)), label=label)
    axes.plot(*series, color=STUDENT, linewidth=1.8, marker="o", markersize=3.5, label="student")
    _legend(axes, columns=3)
    return _to_svg(figure, title)


def draw_histogram(bins: Mapping[int, Series], title: str) -> str:
    """Draw a histogram's course as a heat map: steps across, bins from 0 to 1 upwards, darker is more."""
    figure, axes = _axes()
    steps = bins[min(bins)][0]
    table = np.stack([np.interp(steps, *bins[i]) for i in sorted(bins)])  # [bins, T]
    total = table.sum(axis=0, keepdims=True)
    share = table / np.where(total > 0, total, 1.0)
    extent = (float(steps[0]), float(steps[-1]) + 1e-6, 0.0, 1.0)
    axes.imshow(share, origin="lower", aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
    axes.grid(False)
    return _to_svg(figure, title)


def split_histograms(series: Mapping[str, Series]) -> tuple[dict[str, dict[int, Series]], dict[str, Series]]:
    """Separate histogram bins (`<name>/hist_<i>`) from plain metrics."""
    histograms: dict[str, dict[int, Series]] = {}
    plain: dict[str, Series] = {}
    for name, values in series.items():
        match = HISTOGRAM.fullmatch(name)
        if match:
            histograms.setdefault(match[1], {})[int(match[2])] = values
        else:
            plain[name] = values
    return histograms, plain


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.1, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(nbins=6)
    axes.set_xlabel("step", fontsize=9, color=INK)
    return figure, axes


def _limits_of_constants(series: Sequence[Series]) -> tuple[float, float] | None:
    """Frame lines that do not move, which automatic limits would magnify to rounding errors; else None."""
    values = np.concatenate([values[np.isfinite(values)] for _, values in series])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return None
    return (min(0.0, 1.5 * low), max(0.0, 1.5 * high)) if high or low else (-0.05, 1.0)


def _legend(axes: Axes, *, columns: int) -> None:
    """Name the lines above the drawing, where they hide nothing."""
    axes.legend(
        fontsize=9,
        labelcolor=INK,
        frameon=False,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderaxespad=0.0,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _to_svg(figure: Figure, title: str) -> str:
    """Write the figure as an SVG element that takes the page's fonts and colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', text, count=1)
    for stand_in, variable in PAGE_COLOURS.items():
        text = text.replace(stand_in, variable)
    return re.sub(r"(font: )([\d.]+px) [^;\"]*", r"\1\2 var(--sans)", text)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Smooth with a centred window of about a thirtieth of the run, narrower at the ends; NaN are left out."""
    half = max(1, len(values) // 60)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _thinned(steps: np.ndarray, values: np.ndarray) -> Series:
    every = max(1, -(-len(steps) // MAX_POINTS))
    return steps[::every], values[::every]


def _short_names(names: list[str]) -> dict[str, str]:
    """Drop the part before the slash where all names share it."""
    prefixes = {name.split("/")[0] for name in names}
    return {name: name.split("/", 1)[-1] if len(prefixes) == 1 else name for name in names}
