"""Finds the named balls in a video: sub-pixel position, mass and colour per frame. No physics, no metrics.

Every pixel is `background + alpha (colour - background)` near a ball, also under blur, so alpha is linear in the pixel
values (least squares against the named colours) and its centroid is exact for any linear softening of the edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afd.teachers.physics_scene import COLOURS, RADII, Ball

WINDOW_MARGIN_PX = 2.0
"""A ball's pixels are looked for within its radius plus this many pixels."""

VISIBLE_MASS = (0.5, 1.6)
"""A ball counts as there when its mass over the expected area is in this band."""

TRACKED_MASS = 0.3
"""Least mass over the expected area at which a position is used at all."""

_SETTLING_ROUNDS = 4
_CLUTTER_LEVEL = 0.15
_CORE = 0.8
_LEAST_LIKENESS = 0.85


@dataclass(frozen=True)
class BallTracks:
    """What a video shows of the named balls.

    Args:
        position: [F, num_balls, 2] float64, (x, y) of the centroid in box widths, y down; meaningless if not tracked.
        mass: [F, num_balls] float64, sum of alpha over the expected area; 1 for an unshaded ball.
        is_tracked: [F, num_balls] bool, mass >= `TRACKED_MASS`.
        is_visible: [F, num_balls] bool, mass in `VISIBLE_MASS` and the named colour is the nearest one.
        radius: [num_balls] float64, the middle of the size's band, box widths.
        clutter: [F] float64, light outside all balls' windows over the light of the expected balls.
        sharpness: edge energy over edge length in alpha units, 1 / px: sum |grad alpha|^2 / sum |grad alpha|;
            NaN if no ball is tracked.
    """

    position: np.ndarray
    mass: np.ndarray
    is_tracked: np.ndarray
    is_visible: np.ndarray
    radius: np.ndarray
    clutter: np.ndarray
    sharpness: float


def track_balls(video: np.ndarray, balls: Sequence[Ball], *, background: float) -> BallTracks:
    """Follow the named balls frame by frame (no smoothing over time, so a teleport stays one).

    Args:
        video: [F, H, W, 3] float in [0, 1].
        balls: the prompt's balls, distinct colours.
        background: grey level of the background.
    Raises:
        ValueError: video is not [F, H, W, 3] or holds values that are not finite.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or min(video.shape) < 1:
        raise ValueError(f"video must be [F, H, W, 3], got {list(video.shape)}")
    if not np.isfinite(video).all():
        raise ValueError("video must hold finite values only")
    num_frames, height, width, _ = video.shape
    light = video.astype(np.float32) - np.float32(background)
    contrast = np.array([COLOURS[ball.colour] for ball in balls], dtype=np.float32) - background  # [num_balls, 3]
    alphas = np.moveaxis(light @ np.linalg.pinv(contrast).astype(np.float32), -1, 0)  # [num_balls, F, H, W]
    x = ((np.arange(width) + 0.5) / width).astype(np.float32)
    y = ((np.arange(height) + 0.5) / height).astype(np.float32)
    radius = np.array([sum(RADII[ball.size]) / 2 for ball in balls])
    position = np.empty((num_frames, len(balls), 2))
    mass = np.empty((num_frames, len(balls)))
    is_named = np.empty((num_frames, len(balls)), dtype=bool)
    outside = np.ones((num_frames, height, width), dtype=bool)
    inside: list[np.ndarray] = []
    for i, ball in enumerate(balls):
        centre = _brightest_spot(alphas[i], x, y, float(radius[i]))
        reach = float(radius[i]) + WINDOW_MARGIN_PX / max(height, width)
        for _ in range(_SETTLING_ROUNDS - 1):
            centre, _ = _centroid(alphas[i] * _disc(centre, reach, x, y), x, y, centre)
        centre, total = _centroid(alphas[i] * _disc(centre, reach, x, y), x, y, centre)
        window = _disc(centre, reach, x, y)
        position[:, i], mass[:, i] = centre, total / (np.pi * radius[i] ** 2 * height * width)
        is_named[:, i] = _is_nearest_colour(
            light, _disc(centre, _CORE * float(radius[i]), x, y), ball.colour, background
        )
        outside &= ~window
        inside.append(window)
    expected = float((np.pi * radius**2 * height * width * np.linalg.norm(contrast, axis=1)).sum())
    stray = np.linalg.norm(light, axis=-1) * outside
    clutter = np.where(stray > _CLUTTER_LEVEL, stray, 0.0).sum(axis=(1, 2)) / expected
    is_tracked = mass >= TRACKED_MASS
    is_visible = (mass >= VISIBLE_MASS[0]) & (mass <= VISIBLE_MASS[1]) & is_named
    sharpness = _edge_sharpness(alphas, np.stack(inside), is_tracked)
    return BallTracks(position, mass, is_tracked, is_visible, radius, clutter.astype(np.float64), sharpness)


def _brightest_spot(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Centre [F, 2] of the ball-sized square that holds the most of alpha [F, H, W]."""
    num_frames, height, width = alpha.shape
    rows, cols = (max(1, min(size, round(1.6 * radius * size))) for size in (height, width))
    sums = np.zeros((num_frames, height + 1, width + 1), dtype=np.float32)
    np.cumsum(np.cumsum(np.clip(alpha, 0.0, 1.0), axis=1), axis=2, out=sums[:, 1:, 1:])
    boxes = sums[:, rows:, cols:] - sums[:, :-rows, cols:] - sums[:, rows:, :-cols] + sums[:, :-rows, :-cols]
    best_row, best_col = np.unravel_index(boxes.reshape(num_frames, -1).argmax(axis=1), boxes.shape[1:])
    return np.stack([(best_col + cols / 2) / width, (best_row + rows / 2) / height], axis=1)


def _disc(centre: np.ndarray, reach: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[F, H, W] bool: pixels within reach of centre [F, 2]."""
    dx, dy = x - centre[:, :1], y - centre[:, 1:]
    return (dx * dx)[:, None, :] + (dy * dy)[:, :, None] <= reach * reach


def _centroid(weight: np.ndarray, x: np.ndarray, y: np.ndarray, fallback: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid [F, 2] and sum [F] of weight [F, H, W]; `fallback` where there is next to nothing."""
    columns, rows = weight.sum(axis=1), weight.sum(axis=2)
    total = rows.sum(axis=1).astype(np.float64)
    is_empty = total < 0.5
    safe = np.where(is_empty, 1.0, total)
    centre = np.stack([columns @ x, rows @ y], axis=1) / safe[:, None]
    return np.where(is_empty[:, None], fallback, np.clip(centre, 0.0, 1.0)), total


def _is_nearest_colour(light: np.ndarray, core: np.ndarray, name: str, background: float) -> np.ndarray:
    """[F] bool: the mean light of the core points to the named colour more than to any other."""
    mean = (light * core[..., None]).sum(axis=(1, 2))  # [F, 3]
    table = np.array(list(COLOURS.values())) - background
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    likeness = mean @ table.T / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)
    return (likeness.argmax(axis=1) == list(COLOURS).index(name)) & (likeness.max(axis=1) >= _LEAST_LIKENESS)


def _edge_sharpness(alphas: np.ndarray, windows: np.ndarray, is_tracked: np.ndarray) -> float:
    """Sum |grad alpha|^2 / sum |grad alpha| over the windows [num_balls, F, H, W] of the tracked balls, 1 / px."""
    right, down = np.diff(alphas, axis=3)[:, :, :-1], np.diff(alphas, axis=2)[..., :-1]
    squared = (right * right + down * down) * windows[:, :, :-1, :-1] * is_tracked.T[:, :, None, None]
    length = float(np.sqrt(squared).sum())
    return float(squared.sum()) / length if length > 0 else float("nan")
