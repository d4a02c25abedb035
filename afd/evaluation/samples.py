"""Sample videos and contact sheets: teacher, base and student on the same prompts and seeds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from afd.data.video import encode_video
from afd.evaluation.report import contact_sheet

_WATCH_PIXELS = 192  # tiny videos are enlarged to about this height


def prompt_slug(prompt: str) -> str:
    """A file name made of a prompt: lower case, words joined by dashes, at most 60 characters."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")


def write_samples(folder: Path, prompts: list[str], videos: dict[str, np.ndarray], *, fps: float) -> Path:
    """Write `<prompt>.<model>.mp4` for every prompt and model, and `contact_sheet.png`.

    Args:
        folder: created if missing; files of the same names are replaced.
        prompts: P strings.
        videos: model name to [P, F, height, width, 3] float32 in [0, 1].
        fps: frames per second.
    Returns:
        The contact sheet's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, np.ndarray] = {}
    for index, prompt in enumerate(prompts):
        for model, clips in videos.items():
            scale = max(1, _WATCH_PIXELS // clips.shape[2])
            encode_video(
                clips[index], folder / f"{prompt_slug(prompt)}.{model}.mp4", fps=fps, scale=scale, upscale="bicubic"
            )
            rows[f"{model}: {prompt}"] = clips[index]
    sheet = folder / "contact_sheet.png"
    contact_sheet(rows, sheet, upscale=max(1, 64 // next(iter(videos.values())).shape[2]))
    return sheet
