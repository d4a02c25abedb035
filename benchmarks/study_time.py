"""How long the study takes: said before it starts, corrected by what its own rows took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from study_rows import FAMILIES, WORLDS, Preset, Row

from afd.config_file import load_config
from afd.models.encoders import latent_shape, student_path
from afd.models.weights import load_student

STEP_S = {"sft": 1.1, "gan": 2.5, "dmd": 4.0, "afd": 3.0}
"""Seconds per student update at 32 rollouts of 12 frames, chunk-wise, one thread, where `pass_seconds` is `PASS_S`."""
WARMUP_S = 1.05
PASS_S = 0.24
START_S = 15.0
CLIP_S = 0.035
_FRAME_WISE = 1.5
_LONG = 3.4


def pass_seconds(device: str) -> float:
    """How fast this machine is: seconds of one forward and backward pass of the chunk-wise base student over eight
    clips, the fastest of five."""
    config = load_config(Path(FAMILIES["chunk_wise"]))
    student = load_student(student_path(config.student), config=config.student.model_dump()).to(device)
    shape, (channels, frames, height, width) = student.shape, latent_shape(config.encoders, config.video)
    clips = torch.randn(8, channels, frames, height, width, device=device)
    times, prompts = torch.rand(8, frames, device=device), torch.randn(8, shape.text_len, shape.text_dim, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        student(clips, times, prompts, clean=clips).square().mean().backward()
        if clips.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Clock:
    """Estimates rows by a table of seconds, times how much slower this machine is, times what finished rows of the same
    method took against that.

    Args:
        preset: whose rows.
        slowness: seconds of something here over the seconds of the same where the table was measured.
    """

    def __init__(self, preset: Preset, *, slowness: float = 1.0) -> None:
        self.preset, self.slowness = preset, slowness
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # method -> estimated, measured

    def seconds(self, row: Row, updates: int | None = None) -> float:
        """Estimated seconds of a row on one device."""
        preset = self.preset
        longer = _LONG if "video.num_frames=36" in WORLDS[row.world] else 1.0
        slower = self.slowness * longer * (_FRAME_WISE if row.family == "frame_wise" else 1.0)
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
        training = self.slowness * self.preset.real_score_steps * STEP_S["sft"] * self.preset.rollouts / 32
        scores = len(worlds) * (START_S + training)
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
