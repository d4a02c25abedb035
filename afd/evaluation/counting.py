"""How many balls a video of the built-in world shows, and whether they pass through each other.

| metric | unit | truth | undefined (NaN) when |
|---|---|---|---|
| count_fidelity | share | 1 | never |
| collision_error | of the balls' distance at touch | 0 | fewer than two balls, or never side by side |

Beside physics.py, which follows the named balls: here nothing is looked for by name, so a ball too many counts as well.
"""

from __future__ import annotations

import cv2
import numpy as np

from afd.evaluation.ball_tracking import track_balls
from afd.teachers.physics_scene import parse_prompt

METRICS = ("count_fidelity", "collision_error")
_LEVEL = 0.25  # of full light above the background: a ball's pixel, not its halo
_LEAST_AREA = 0.15  # of a small ball's disc: less is a speck
_SMALL_RADIUS = 0.095  # box widths
_NEAR = 1.5  # times the distance at touch: closer balls may be about to collide


def measure_counts(video: np.ndarray, prompt: str, *, background: float = 0.08) -> dict[str, float]:
    """Measure one video.

    `count_fidelity` is 1 where the most frequent number of separate bright regions over the frames is the prompt's
    number of balls (the larger of two equally frequent numbers: balls that touch count as one region).
    `collision_error` is the deepest overlap of two tracked balls over their distance at touch.

    Args:
        video: [F, H, W, 3] float in [0, 1].
        prompt: a sentence of the built-in world.
        background: grey level of the background.
    Raises:
        ValueError: the video is not [F, H, W, 3], or the prompt is not of this world.
    """
    balls = parse_prompt(prompt)
    tracks = track_balls(video, balls, background=background)
    counts = np.bincount(_regions(video, background), minlength=3)
    shown = len(counts) - 1 - int(counts[::-1].argmax())
    return {
        "count_fidelity": float(shown == len(balls)),
        "collision_error": _overlap(tracks.position, tracks.is_tracked, tracks.radius),
    }


def _regions(video: np.ndarray, background: float) -> np.ndarray:
    """Separate bright regions per frame [F]."""
    _, height, width, _ = video.shape
    least = max(1.0, _LEAST_AREA * np.pi * _SMALL_RADIUS**2 * height * width)
    is_bright = (video.max(axis=-1) > background + _LEVEL).astype(np.uint8)
    found = [cv2.connectedComponentsWithStats(frame, connectivity=4)[2] for frame in is_bright]
    return np.array([int((stats[1:, cv2.CC_STAT_AREA] >= least).sum()) for stats in found])


def _overlap(position: np.ndarray, is_tracked: np.ndarray, radius: np.ndarray) -> float:
    """Deepest overlap over the distance at touch; NaN unless two tracked balls come near each other."""
    if len(radius) < 2:
        return float("nan")
    both = is_tracked.all(axis=1)
    distance = np.linalg.norm(position[:, 0] - position[:, 1], axis=1)[both] / radius.sum()
    if not len(distance) or distance.min() > _NEAR:
        return float("nan")
    return max(0.0, 1.0 - float(distance.min()))
