"""What each evaluation metric means and where its truth lies: labels, units and targets for tables and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ROLES = ("base", "student", "teacher")


@dataclass(frozen=True)
class MetricFact:
    """How to read one metric.

    Attributes:
        label: what a person calls it.
        unit: printed after the number; empty for shares and ratios.
        target: the ideal value, or "teacher" when the teacher's own value is the ideal, or "lower" / "higher".
        meaning: one sentence.
    """

    label: str
    unit: str
    target: float | Literal["teacher", "lower", "higher"]
    meaning: str


FACTS: dict[str, MetricFact] = {
    "gravity_error": MetricFact("Gravity error", "", 0.0, "Relative error of the acceleration fitted to free flight."),
    "gravity_estimate": MetricFact("Gravity estimate", "g", 1.0, "Fitted acceleration over the world's true one."),
    "trajectory_residual": MetricFact(
        "Trajectory residual", "px", 0.0, "Distance of the tracked path from a parabola."
    ),
    "largest_jump": MetricFact("Largest jump", "px", 0.0, "Worst break of a path between neighbouring frames."),
    "energy_error": MetricFact("Energy error", "", 0.0, "Drift of a flight's energy, in units of g times the box."),
    "momentum_error": MetricFact("Momentum error", "box/s", 0.0, "Drift of the sideways speed in free flight."),
    "bounce_timing_error": MetricFact("Bounce timing error", "s", 0.0, "How early or late bounces come."),
    "dynamic_degree": MetricFact("Dynamic degree", "px/frame", "teacher", "How much moves; a frozen video scores 0."),
    "object_permanence": MetricFact("Object permanence", "", 1.0, "Share of frames in which each ball is there."),
    "colour_fidelity": MetricFact("Colour fidelity", "", 1.0, "Share of balls in the colour the prompt names."),
    "direction_fidelity": MetricFact("Direction fidelity", "", 1.0, "Share of balls thrown the way the prompt says."),
    "clutter": MetricFact("Clutter", "ball areas", 0.0, "Visible stuff that belongs to no ball."),
    "sharpness": MetricFact("Sharpness", "", "teacher", "Edge contrast; falls when a student blurs."),
    "motion_change": MetricFact(
        "Motion change", "", "teacher", "Change of the flow from frame to frame over its size."
    ),
    "brightness_flicker": MetricFact("Brightness flicker", "", "teacher", "Change of a frame's mean brightness."),
    "measured_share": MetricFact("Measured share", "", 1.0, "Share of balls with a flight long enough to fit."),
}
HEADLINE = ("gravity_error", "bounce_timing_error", "trajectory_residual", "dynamic_degree", "sharpness")


@dataclass(frozen=True)
class Comparison:
    """One metric of base, student and teacher side by side.

    Attributes:
        name: key of the metric.
        fact: how to read it.
        base, student, teacher: (mean, standard error), NaN where not measured.
        change: (student - base) / |base|, NaN where undefined.
        verdict: "better", "worse" or "same" (within twice the combined standard error), or "" without a judgement.
    """

    name: str
    fact: MetricFact
    base: tuple[float, float]
    student: tuple[float, float]
    teacher: tuple[float, float]
    change: float
    verdict: str


def compare(evaluation: Mapping[str, Any]) -> list[Comparison]:
    """Compare the roles of `evaluation.json`.

    Args:
        evaluation: {"base" | "student" | "teacher": {metric: {"mean", "sem", "n"}}}; roles and metrics may be absent.
    Returns:
        One comparison per metric, in the order in which they first appear.
    """
    names = dict.fromkeys(name for role in ROLES for name in evaluation.get(role) or {})
    return [_compare_one(name, evaluation) for name in names]


def terminal_table(evaluation: Mapping[str, Any]) -> str:
    """Lay base, student and teacher out as a plain-text table, one metric a line."""
    header = ("metric", *ROLES, "change", "")
    rows: list[tuple[str, ...]] = [header]
    for row in compare(evaluation):
        change = "" if math.isnan(row.change) else f"{100 * row.change:+.1f} %"
        values = (format_value(row.base), format_value(row.student), format_value(row.teacher))
        name = f"{row.name} [{row.fact.unit}]" if row.fact.unit else row.name
        rows.append((name, *values, change, row.verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


def format_value(value: tuple[float, float]) -> str:
    """Write mean +- standard error with as many digits as the error deserves."""
    mean, sem = value
    if math.isnan(mean):
        return "-"
    scale = sem if sem > 0 else abs(mean) / 100
    digits = 3 if scale <= 0 or math.isnan(scale) else min(max(1 - math.floor(math.log10(scale)), 0), 5)
    text = f"{mean:.{digits}f}"
    return text if math.isnan(sem) else f"{text} ± {sem:.{digits}f}"


def _compare_one(name: str, evaluation: Mapping[str, Any]) -> Comparison:
    fact = FACTS.get(
        name, MetricFact(name.replace("_", " ").capitalize(), "", "lower" if "error" in name else "higher", "")
    )
    base, student, teacher = (_mean_and_error(evaluation, role, name) for role in ROLES)
    change = (student[0] - base[0]) / abs(base[0]) if base[0] else float("nan")
    return Comparison(name, fact, base, student, teacher, change, _verdict(fact, base, student, teacher))


def _mean_and_error(evaluation: Mapping[str, Any], role: str, name: str) -> tuple[float, float]:
    entry = (evaluation.get(role) or {}).get(name)
    if isinstance(entry, int | float):
        return float(entry), float("nan")
    mean, sem = ((entry or {}).get(key) for key in ("mean", "sem"))
    return (float("nan") if mean is None else float(mean), float("nan") if sem is None else float(sem))


def _verdict(
    fact: MetricFact, base: tuple[float, float], student: tuple[float, float], teacher: tuple[float, float]
) -> str:
    if math.isnan(base[0]) or math.isnan(student[0]):
        return ""
    noise = 2 * math.hypot(*(0.0 if math.isnan(sem) else sem for sem in (base[1], student[1])))
    if abs(student[0] - base[0]) <= noise:
        return "same"
    if fact.target in ("lower", "higher"):
        return "better" if (student[0] < base[0]) == (fact.target == "lower") else "worse"
    target = teacher[0] if fact.target == "teacher" else float(fact.target)
    if math.isnan(target):
        return ""
    return "better" if abs(student[0] - target) < abs(base[0] - target) else "worse"
