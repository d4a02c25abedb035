"""Known ways in which this kind of training fails, read off a run's curves; each sign states its threshold.

Levels are means over the last quarter of the run ("late"), compared with the first quarter ("early") where a trend
counts. A sign whose metric was not recorded says so instead of passing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from afd.evaluation.discriminator_signs import FailureSign, Series, collapsed_sign, stale_sign
from afd.evaluation.metric_facts import compare

__all__ = ["FailureSign", "failure_signs"]

ACCURACY_TOO_HIGH, ACCURACY_TOO_LOW = 0.98, 0.55
LEAST_WEIGHT_STD = 0.02
MOST_SATURATED = 0.5
LARGEST_MARGIN = 10.0
LEAST_SHARPNESS_RATIO = 0.85
LEAST_MOTION_RATIO = 0.7
LARGEST_RESIDUAL_RATIO = 1.5
LARGEST_DEVIATION_GROWTH = 10.0


def failure_signs(
    series: Mapping[str, Series], evaluation: Mapping[str, Any], warmup: Mapping[str, Series] | None = None
) -> list[FailureSign]:
    """Check a run for every known failure.

    Args:
        series: {metric: (steps [T], values [T])}.
        evaluation: content of `evaluation.json`, or empty.
        warmup: the same as `series` of the discriminator's warm-up, where there was one.
    """
    return [
        _level(
            "Discriminator has won",
            series,
            ("discriminator/accuracy",),
            lambda late: late > ACCURACY_TOO_HIGH,
            f"accuracy above {ACCURACY_TOO_HIGH} late in the run: its scores no longer order the rollouts",
        ),
        _level(
            "Discriminator cannot tell",
            series,
            ("discriminator/accuracy",),
            lambda late: late < ACCURACY_TOO_LOW,
            f"accuracy below {ACCURACY_TOO_LOW}: a perfect student, or a discriminator that does not learn",
        ),
        stale_sign(series),
        collapsed_sign(series, warmup or {}),
        _level(
            "Scores saturated",
            series,
            ("discriminator/margin", "discriminator/margin_mean"),
            lambda late: abs(late) > LARGEST_MARGIN,
            f"margin beyond {LARGEST_MARGIN:g}: the Bradley-Terry loss is flat there",
        ),
        _level(
            "Weights carry no signal",
            series,
            ("rollout/weight_std", "student/weight_std", "weight/std", "weights/std", "nft/weight_std"),
            lambda late: late < LEAST_WEIGHT_STD,
            f"standard deviation of the optimality weights below {LEAST_WEIGHT_STD}",
        ),
        _level(
            "Weights saturated",
            series,
            ("rollout/weight_saturated_share", "student/weight_saturated_share", "weight/saturated_share"),
            lambda late: late > MOST_SATURATED,
            f"more than {MOST_SATURATED:.0%} of the weights at 0 or 1",
        ),
        _level(
            "Groups without spread",
            series,
            ("rollout/zero_std_share", "weight/zero_std_share", "student/zero_std_share", "advantage/zero_std_share"),
            lambda late: late > MOST_SATURATED,
            f"more than {MOST_SATURATED:.0%} of the prompts have rollouts that all score alike",
        ),
        _student_moves(series),
        _deviation_growth(series),
        _skipped_steps(series),
        _not_finite(series),
        _ratio("Rollouts blur", "sharpness", series, evaluation, least=LEAST_SHARPNESS_RATIO),
        _ratio("Motion freezes", "dynamic_degree", series, evaluation, least=LEAST_MOTION_RATIO),
        _ratio("Artefacts grow", "trajectory_residual", series, evaluation, most=LARGEST_RESIDUAL_RATIO),
    ]


def _values(series: Mapping[str, Series], names: tuple[str, ...]) -> np.ndarray | None:
    for name in names:
        if name in series:
            values = series[name][1]
            finite = values[np.isfinite(values)]
            if len(finite):
                return finite
    return None


def _late(values: np.ndarray) -> float:
    return float(values[-max(1, len(values) // 4) :].mean())


def _early(values: np.ndarray) -> float:
    return float(values[: max(1, len(values) // 4)].mean())


def _level(
    name: str, series: Mapping[str, Series], metrics: tuple[str, ...], is_bad: Callable[[float], bool], threshold: str
) -> FailureSign:
    values = _values(series, metrics)
    if values is None:
        return FailureSign(name, "unknown", f"{metrics[0]} not recorded", threshold)
    late = _late(values)
    return FailureSign(name, "warning" if is_bad(late) else "ok", f"late mean {late:.3g}", threshold)


def _student_moves(series: Mapping[str, Series]) -> FailureSign:
    threshold = "learning rate or gradient norm is zero throughout"
    rate = _values(series, ("student/lr", "student/learning_rate"))
    norm = _values(series, ("student/grad_norm",))
    known = {name: values for name, values in (("lr", rate), ("grad norm", norm)) if values is not None}
    if not known:
        return FailureSign("Student does not move", "unknown", "student/lr, student/grad_norm not recorded", threshold)
    stuck = [name for name, values in known.items() if not values.any()]
    seen = ", ".join(f"{name} up to {values.max():.3g}" for name, values in known.items())
    return FailureSign("Student does not move", "warning" if stuck else "ok", seen, threshold)


def _deviation_growth(series: Mapping[str, Series]) -> FailureSign:
    name = "Student runs away"
    threshold = f"old deviation grows more than {LARGEST_DEVIATION_GROWTH:g}-fold from early to late"
    values = _values(series, ("student/old_deviation",))
    if values is None or not values.any():
        return FailureSign(name, "unknown", "student/old_deviation not recorded, or zero by construction", threshold)
    # The first steps start from zero deviation; the second quarter is the first level that means something.
    quarter = max(1, len(values) // 4)
    early = float(values[quarter : 2 * quarter].mean()) if len(values) >= 8 else _early(values)
    growth = _late(values) / early if early > 0 else float("inf")
    state = "warning" if growth > LARGEST_DEVIATION_GROWTH else "ok"
    return FailureSign(name, state, f"x {growth:.2f}", threshold)


def _skipped_steps(series: Mapping[str, Series]) -> FailureSign:
    names = [name for name in series if name.endswith("skipped_steps")]
    threshold = "any optimizer step skipped (overflow)"
    if not names:
        return FailureSign("Skipped steps", "unknown", "skipped_steps not recorded", threshold)
    worst = max(float(np.nanmax(series[name][1])) for name in names)
    return FailureSign("Skipped steps", "warning" if worst > 0 else "ok", f"{worst:g}", threshold)


def _not_finite(series: Mapping[str, Series]) -> FailureSign:
    threshold = "a training metric is NaN or infinite"
    training = {name: values for name, (_, values) in series.items() if not name.startswith("eval/")}
    bad = [name for name, values in training.items() if not np.isfinite(values).all()]
    if not training:
        return FailureSign("Numbers break", "unknown", "no metrics recorded", threshold)
    return FailureSign("Numbers break", "warning" if bad else "ok", ", ".join(bad[:4]) or "all finite", threshold)


def _ratio(
    name: str,
    metric: str,
    series: Mapping[str, Series],
    evaluation: Mapping[str, Any],
    *,
    least: float | None = None,
    most: float | None = None,
) -> FailureSign:
    """Compare the student with the base student, from the final evaluation or else from the rollouts' own curve."""
    bound = f"below {least:g}" if least is not None else f"above {most:g}"
    threshold = f"{metric.replace('_', ' ')} of the student over the base student's {bound}"
    ratio, source = float("nan"), ""
    for row in compare(evaluation):
        if row.name == metric and row.base[0]:
            ratio, source = row.student[0] / row.base[0], "evaluation"
    values = _values(series, (f"eval/{metric}", f"rollout/{metric}"))
    if not np.isfinite(ratio) and values is not None and _early(values):
        ratio, source = _late(values) / _early(values), "late over early"
    if not np.isfinite(ratio):
        return FailureSign(name, "unknown", f"{metric} not recorded", threshold)
    is_bad = (least is not None and ratio < least) or (most is not None and ratio > most)
    return FailureSign(name, "warning" if is_bad else "ok", f"x {ratio:.2f} ({source})", threshold)
