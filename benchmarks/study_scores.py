"""From metrics to two totals per row, and what the search chooses by them."""

from __future__ import annotations

import math
from collections.abc import Mapping

ERRORS = ("gravity_error", "energy_error", "momentum_error", "bounce_timing_error", "collision_error")
SHARES = ("object_permanence", "colour_fidelity", "count_fidelity", "direction_fidelity")
MOTION = ("dynamic_degree", "trajectory_residual", "largest_jump", "motion_change")
QUALITY = ("frechet", "sharpness")
LONG = ("gravity_error", "trajectory_residual", "object_permanence", "sharpness", "dynamic_degree")
METRICS = (*ERRORS, *MOTION, *QUALITY, *SHARES, "clutter", *(f"long/{name}" for name in LONG))
TOTALS = ("physics_total", "general_total")
_FLOOR = 0.01  # errors below it are measurement noise: a base without error must not divide by zero


def faults(values: Mapping[str, float], teacher: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What is wrong with a row: physics errors, and shortfalls of general quality; 0 is perfect, NaN are left out.

    `object_permanence` and the fidelities fall short of 1, `sharpness` of the teacher's (either way), `frechet` is a
    distance already.
    """
    physics = {name: values.get(name, math.nan) for name in ERRORS}
    general = {name: 1 - values.get(name, math.nan) for name in SHARES}
    general["frechet"] = values.get("frechet", math.nan)
    sharp = teacher.get("sharpness", math.nan)
    general["sharpness"] = abs(values.get("sharpness", math.nan) - sharp) / sharp
    return tuple({name: each for name, each in part.items() if not math.isnan(each)} for part in (physics, general))  # type: ignore[return-value]


def totals(values: Mapping[str, float], base: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """`physics_total` and `general_total` in percent: 50 is the base student of the same cell, 100 is without fault.

    Each is the mean over its metrics of base / (base + own), the base's share of both students' faults; a metric counts
    where both have it.
    """
    result = {}
    for name, own, ground in zip(TOTALS, faults(values, teacher), faults(base, teacher), strict=True):
        ratios = [(ground[key] + _FLOOR) / (ground[key] + own[key] + 2 * _FLOOR) for key in own.keys() & ground.keys()]
        result[name] = 100 * sum(ratios) / len(ratios) if ratios else math.nan
    return result


def preference(result: Mapping[str, float]) -> float:
    """What the search maximises: physics and general quality count alike."""
    return sum(result[name] for name in TOTALS) / len(TOTALS)
