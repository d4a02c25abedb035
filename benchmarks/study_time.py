"""How long the study takes: said before it starts, corrected by what its own rows took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from study_rows import WORLDS, Preset, Row

STEP_S = {"sft": 0.45, "gan": 1.15, "dmd": 1.25, "afd": 1.05}
"""Seconds per student update at 32 rollouts of 12 frames, chunk-wise, one thread of the machine in docs/study.md."""
WARMUP_S = 0.55
START_S = 14.0
CLIP_S = 0.035
_FRAME_WISE = 1.8
_LONG = 3.4


class Clock:
    """Estimates rows by a table of seconds, times what finished rows of the same method took against it."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # method -> estimated, measured

    def seconds(self, row: Row, updates: int | None = None) -> float:
        """Estimated seconds of a row on one device."""
        preset = self.preset
        longer = _LONG if "video.num_frames=36" in WORLDS[row.world] else 1.0
        slower = longer * (_FRAME_WISE if row.family == "frame_wise" else 1.0)
        clips = preset.heldout_prompts * preset.seeds_per_prompt + 3 * preset.long_prompts
        measuring = slower * CLIP_S * (3 * preset.validation_prompts + (clips if row.table != "search" else 0))
        if row.method == "base":
            return measuring
        warmup = preset.warmup_steps * WARMUP_S if row.method in ("afd", "gan") else 0.0
        training = (updates or preset.steps * row.own.get("budget", 1.0)) * STEP_S[row.method] + warmup
        estimate = START_S + slower * training * preset.rollouts / 32 + measuring
        estimated, measured = self._spent[row.method]
        return estimate * (measured / estimated if estimated else 1.0)

    def note(self, row: Row, updates: int, measured: float) -> None:
        """Remember what a finished row took; a row that was there already says nothing."""
        if measured > 1.0:
            spent = self._spent[row.method]
            estimate = self.seconds(row, updates) / (spent[1] / spent[0] if spent[0] else 1.0)
            spent[0] += estimate
            spent[1] += measured

    def left(self, rows: Sequence[Row], num_devices: int) -> str:
        """Time of rows on all devices, in words."""
        return in_words(sum(map(self.seconds, rows)) / num_devices)

    def describe(self, searches: Sequence[Row], rows: Sequence[Row], num_devices: int) -> str:
        """What will run and how long that takes, before anything is started."""
        tables = {"search": searches} | {name: [row for row in rows if row.table == name] for name in _tables(rows)}
        lines = [
            f"{name}: {len(chosen)} rows, {self.left(chosen, num_devices)}" for name, chosen in tables.items() if chosen
        ]
        worlds = {row.world for row in rows if row.method == "dmd"}
        scores = len(worlds) * (START_S + self.preset.real_score_steps * STEP_S["sft"] * self.preset.rollouts / 32)
        total = (sum(map(self.seconds, (*searches, *rows))) + scores) / num_devices
        what = f"{num_devices} runs at a time"
        return "\n".join(
            [f"preset {self.preset.name}, {what}:", *lines, f"{len(worlds)} real scores for DMD: {in_words(scores)}",
             f"estimated total: {in_words(total)} (corrected as rows finish)"]
        )  # fmt: skip


def _tables(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.table for row in rows))


def in_words(seconds: float) -> str:
    """A duration a person can read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
