"""Signs of a discriminator that learns too slowly or too fast, read off its curves; each states its threshold.

Measured on the built-in world (240 steps): frozen after its warm-up, accuracy went from 0.77 to 0.59; with twenty times
the learning rate, the margin fell from 0.42 to under 0.01 within sixty steps while accuracy stayed at 0.6. The other 21
recorded runs of that time, of 57 to 1,000 steps, raise neither sign. The quick start, whose student may go further in a
step since, ends with a margin below 0.1, where its physics has stopped improving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Series = tuple[np.ndarray, np.ndarray]
State = Literal["ok", "warning", "unknown"]

FEWEST_VALUES = 32
LARGEST_ACCURACY_LOSS = 0.1
LEAST_RELATIVE_DRIFT = 0.25
LEAST_MARGIN_SHARE = 0.1
LEAST_MARGIN, RANKING_ACCURACY = 0.1, 0.6


@dataclass(frozen=True)
class FailureSign:
    """One check: what it looks for, what was seen, and what the threshold is."""

    name: str
    state: State
    seen: str
    threshold: str


def stale_sign(series: Mapping[str, Series]) -> FailureSign:
    """The student outruns a discriminator that stands still.

    A falling accuracy is also what a student that catches up looks like; then D itself moves on its probe set.
    """
    name = "Discriminator is stale"
    threshold = (
        f"it does not move, or accuracy falls by more than {LARGEST_ACCURACY_LOSS} from early to late while margins on "
        f"the probe set change by less than {LEAST_RELATIVE_DRIFT:.0%} of their size"
    )
    accuracy, rate = _values(series, "discriminator/accuracy"), _values(series, "discriminator/lr")
    drift, margin = _values(series, "discriminator/probe_drift"), _values(series, "discriminator/probe_margin")
    if rate is not None and not rate.any():
        return FailureSign(name, "warning", "learning rate 0 throughout", threshold)
    if drift is not None and len(drift) > 1 and not drift.any():
        return FailureSign(name, "warning", "scores of the probe set never change", threshold)
    if accuracy is None or len(accuracy) < FEWEST_VALUES:
        return FailureSign(name, "unknown", f"fewer than {FEWEST_VALUES} steps of discriminator/accuracy", threshold)
    loss = _level(accuracy, 0) - _level(accuracy, -1)
    seen = f"accuracy {_level(accuracy, 0):.2f} early, {_level(accuracy, -1):.2f} late"
    if loss <= LARGEST_ACCURACY_LOSS:
        return FailureSign(name, "ok", seen, threshold)
    if drift is None or margin is None:
        return FailureSign(name, "warning", f"{seen}; no probe set tells whether D moved", threshold)
    moved = _level(drift, -1) / max(abs(_level(margin, 0)), 1e-12)
    state = "ok" if moved >= LEAST_RELATIVE_DRIFT else "warning"
    return FailureSign(name, state, f"{seen}; D moved by {moved:.0%} of its margin on the probe set", threshold)


def collapsed_sign(series: Mapping[str, Series], warmup: Mapping[str, Series]) -> FailureSign:
    """A discriminator that learns too fast overshoots, and its scores shrink to nothing while it still ranks; so
    they do when the student has outrun it. Either way they guide no longer."""
    name = "Discriminator has collapsed"
    threshold = (
        f"its margin falls below {LEAST_MARGIN_SHARE:.0%} of the highest it had, warm-up included, or ends below "
        f"{LEAST_MARGIN} at an accuracy above {RANKING_ACCURACY}: it learns too fast, or the student has outrun it"
    )
    accuracy, margin = _values(series, "discriminator/accuracy"), _values(series, "discriminator/margin")
    if accuracy is None or margin is None or len(margin) < FEWEST_VALUES:
        return FailureSign(name, "unknown", f"fewer than {FEWEST_VALUES} steps of discriminator/margin", threshold)
    before = _values(warmup, "discriminator/margin")
    start = [] if before is None or len(before) < FEWEST_VALUES else [_level(before, -1)]
    levels = np.array([*start, *(part.mean() for part in np.array_split(margin, 8))])
    highest = np.maximum.accumulate(levels)
    worst = int(np.argmin(np.where(highest > LEAST_MARGIN, levels / np.maximum(highest, LEAST_MARGIN), np.inf)))
    share = levels[worst] / highest[worst] if highest[worst] > LEAST_MARGIN else 1.0
    late, ranked = _level(margin, -1), _level(accuracy, -1)
    if share < LEAST_MARGIN_SHARE:
        seen = f"margin fell from {highest[worst]:.2g} to {levels[worst]:.2g}"
        return FailureSign(name, "warning", seen, threshold)
    is_mute = late < LEAST_MARGIN and ranked > RANKING_ACCURACY
    return FailureSign(
        name, "warning" if is_mute else "ok", f"late margin {late:.2g} at accuracy {ranked:.2f}", threshold
    )


def _values(series: Mapping[str, Series], name: str) -> np.ndarray | None:
    values = series[name][1] if name in series else np.empty(0)
    finite = values[np.isfinite(values)]
    return finite if len(finite) else None


def _level(values: np.ndarray, quarter: int) -> float:
    """Mean of a quarter of the run: 0 is the first, -1 the last."""
    return float(np.array_split(values, min(4, len(values)))[quarter].mean())
