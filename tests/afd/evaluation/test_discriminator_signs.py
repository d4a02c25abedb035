"""A stale and a too fast discriminator are named, healthy ones are not: curves like the measured ones."""

import numpy as np
import pytest

from afd.evaluation.discriminator_signs import Series, collapsed_sign, stale_sign

# Means over eighths of 240 steps on the built-in world, and the warm-up's last quarter.
STALE = {
    "accuracy": (0.793, 0.741, 0.719, 0.688, 0.707, 0.626, 0.578, 0.599),
    "margin": (0.766, 0.592, 0.527, 0.398, 0.320, 0.249, 0.195, 0.114),
}
FAST = {
    "accuracy": (0.611, 0.598, 0.520, 0.623, 0.665, 0.715, 0.715, 0.742),
    "margin": (0.060, 0.006, 0.000, 0.005, 0.010, 0.045, 0.036, 0.088),
}
HEALTHY = {
    "deep dip": {
        "accuracy": (0.847, 0.841, 0.818, 0.840, 0.816, 0.833, 0.869, 0.830),
        "margin": (0.693, 0.773, 0.631, 0.207, 0.301, 0.378, 0.591, 0.416),
    },
    "steady": {
        "accuracy": (0.822, 0.797, 0.804, 0.838, 0.847, 0.850, 0.850, 0.824),
        "margin": (0.671, 0.367, 0.456, 0.458, 0.431, 0.497, 0.355, 0.405),
    },
    "small margins": {
        "accuracy": (0.692, 0.699, 0.686, 0.744, 0.727, 0.746, 0.754, 0.761),
        "margin": (0.218, 0.225, 0.067, 0.196, 0.111, 0.161, 0.107, 0.182),
    },
    "won": {
        "accuracy": (0.880, 0.894, 0.916, 0.926, 0.932, 0.941, 0.941, 0.947),
        "margin": (2.459, 2.515, 3.274, 3.379, 4.066, 4.786, 4.458, 5.819),
    },
    "low but level": {"accuracy": (0.65, 0.63, 0.6, 0.62, 0.61, 0.6, 0.6, 0.6), "margin": (0.3, *[0.25] * 7)},
}
WARMUP = {"accuracy": (0.637, 0.741, 0.780, 0.812), "margin": (0.017, 0.074, 0.206, 0.417)}


def curves(levels: dict[str, tuple[float, ...]], *, steps: int = 240, seed: int = 0) -> dict[str, Series]:
    """The levels as curves with noise from step to step."""
    noise = np.random.default_rng(seed)
    result = {}
    for name, level in levels.items():
        values = np.repeat(np.array(level), steps // len(level))
        values = values * (1 + 0.1 * noise.normal(size=len(values)))
        result[f"discriminator/{name}"] = (np.arange(1, len(values) + 1), values)
    return result


@pytest.mark.parametrize("steps", [48, 240])
@pytest.mark.parametrize("warmup", [{}, WARMUP], ids=["alone", "with warm-up"])
def test_a_stale_discriminator_is_named(steps: int, warmup: dict[str, tuple[float, ...]]) -> None:
    series = curves(STALE, steps=steps)
    sign = stale_sign(series)
    assert sign.state == "warning"
    assert sign.seen.startswith("accuracy 0.7")
    assert sign.seen.endswith("no probe set tells whether D moved")
    assert collapsed_sign(series, curves(warmup, steps=160)).state == "ok", (
        "its margin ends small, but it ranks no more"
    )


@pytest.mark.parametrize("steps", [48, 240])
@pytest.mark.parametrize("warmup", [{}, WARMUP], ids=["alone", "with warm-up"])
def test_a_too_fast_discriminator_is_named(steps: int, warmup: dict[str, tuple[float, ...]]) -> None:
    series = curves(FAST, steps=steps)
    assert collapsed_sign(series, curves(warmup, steps=160)).state == "warning"
    assert stale_sign(series).state == "ok"


def test_a_margin_that_falls_to_nothing_is_named_by_its_fall() -> None:
    sign = collapsed_sign(curves({"accuracy": (0.8,) * 8, "margin": (0.5, 0.4, 0.02, 0.1, 0.2, 0.3, 0.4, 0.4)}), {})
    assert sign.state == "warning"
    assert sign.seen.startswith("margin fell from 0.5 to 0.02") or sign.seen.startswith("margin fell from 0.49 to 0.02")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_raise_nothing(name: str, seed: int) -> None:
    series, warmup = curves(HEALTHY[name], seed=seed), curves(WARMUP, steps=160, seed=seed)
    assert stale_sign(series).state == "ok"
    assert collapsed_sign(series, warmup).state == "ok"
    assert collapsed_sign(series, {}).state == "ok"


def test_a_student_that_catches_up_with_a_moving_discriminator_is_no_stale_one() -> None:
    moving = curves(STALE | {"probe_drift": (0.1, 0.3, 0.4, 0.5), "probe_margin": (0.6, 0.7, 0.7, 0.8)})
    sign = stale_sign(moving)
    assert sign.state == "ok"
    assert "on the probe set" in sign.seen
    slow = curves(STALE | {"probe_drift": (0.01, 0.02, 0.03, 0.04), "probe_margin": (0.6, 0.6, 0.6, 0.6)})
    assert stale_sign(slow).state == "warning"


def test_a_frozen_discriminator_is_named_before_the_student_outruns_it() -> None:
    steady = HEALTHY["steady"]
    assert stale_sign(curves(steady | {"lr": (0.0,) * 8})).seen == "learning rate 0 throughout"
    assert stale_sign(curves(steady | {"probe_drift": (0.0,) * 4})).state == "warning"
    assert stale_sign(curves(steady | {"lr": (6e-4,) * 8, "probe_drift": (0.3,) * 4})).state == "ok"


def test_short_or_unrecorded_runs_are_unknown() -> None:
    for series in ({}, curves({"accuracy": (0.8,) * 8, "margin": (0.01,) * 8}, steps=8)):
        assert stale_sign(series).state == "unknown"
        assert collapsed_sign(series, {}).state == "unknown"
