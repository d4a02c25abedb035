"""Pixels of the balls: supersampled discs with optional soft edge, shading and sensor noise. No physics, no words."""

from collections.abc import Sequence

import numpy as np

from afd.config import PhysicsConstants
from afd.teachers.physics_scene import COLOURS

_LIGHT = np.array([-0.45, -0.60, 0.66], dtype=np.float32)
_NOISE_STREAM = 7


def render(
    position: np.ndarray, radius: np.ndarray, colours: Sequence[str], constants: PhysicsConstants, *, seed: int = 0
) -> np.ndarray:
    """Draw balls on the plain background.

    Args:
        position: [T, num_balls, 2] float, (x, y) in box widths, y down.
        radius: [num_balls] float, box widths.
        colours: a name of `COLOURS` per ball.
        seed: of the sensor noise; unused when `constants.noise` is 0.
    Returns:
        [T, height, width, 3] uint8.
    Raises:
        ValueError: the shapes disagree or a colour is unknown.
    """
    if position.ndim != 3 or position.shape[1:] != (len(radius), 2) or len(colours) != len(radius):
        raise ValueError(
            f"position must be [T, {len(radius)}, 2] with as many colours, got {list(position.shape)} "
            f"and {len(colours)} colours"
        )
    unknown = [colour for colour in colours if colour not in COLOURS]
    if unknown:
        raise ValueError(f"colours must be among {sorted(COLOURS)}, got {unknown}")
    shape = (position.shape[0], constants.height, constants.width, 3)
    frames = np.full(shape, constants.background, dtype=np.float32)
    for i, colour in enumerate(colours):
        _draw_ball(frames, position[:, i].astype(np.float32), float(radius[i]), colour, constants)
    if constants.noise > 0:
        rng = np.random.Generator(np.random.PCG64([seed % 2**64, _NOISE_STREAM]))
        frames += constants.noise * rng.standard_normal(shape, dtype=np.float32)
    frames *= 255.0
    frames += 0.5
    return np.clip(frames, 0.0, 255.0, out=frames).astype(np.uint8)


def _draw_ball(frames: np.ndarray, centre: np.ndarray, radius: float, colour: str, constants: PhysicsConstants) -> None:
    """Blend one ball into frames [T, H, W, 3] in place; centre is [T, 2]. Only a window around the ball is sampled."""
    num_frames, height, width, _ = frames.shape
    reach = radius + constants.soft_edge
    rows, cols = (min(size, int(np.ceil(2 * reach * size)) + 2) for size in (height, width))
    left = np.clip(np.floor((centre[:, 0] - reach) * width), 0, width - cols).astype(np.int64)  # [T]
    top = np.clip(np.floor((centre[:, 1] - reach) * height), 0, height - rows).astype(np.int64)
    n = constants.supersample
    sub_x = ((np.arange(cols * n, dtype=np.float32) + 0.5) / n + left[:, None]) / width - centre[:, :1]
    sub_y = ((np.arange(rows * n, dtype=np.float32) + 0.5) / n + top[:, None]) / height - centre[:, 1:]
    dx, dy = sub_x.astype(np.float32)[:, None, :], sub_y.astype(np.float32)[:, :, None]  # [T, 1, X], [T, Y, 1]
    squared = dx * dx + dy * dy  # [T, Y, X]
    if constants.soft_edge > 0:
        cover = np.clip((radius - np.sqrt(squared)) / constants.soft_edge + 0.5, 0.0, 1.0)
    else:
        cover = (squared < radius * radius).astype(np.float32)
    base = np.asarray(COLOURS[colour], dtype=np.float32)
    alpha = _pool(cover, n)[..., None]  # [T, rows, cols, 1]
    if constants.shading:
        lift = np.sqrt(np.maximum(radius * radius - squared, 0.0))
        facing = np.maximum(_LIGHT[0] * dx + _LIGHT[1] * dy + _LIGHT[2] * lift, 0.0) / radius
        diffuse = _pool(cover * (0.80 + 0.36 * facing), n)[..., None]
        highlight = _pool(cover * 0.35 * facing**24, n)[..., None]
        paint = diffuse * base + highlight
    else:
        paint = alpha * base
    t = np.arange(num_frames)[:, None, None]
    y = (top[:, None] + np.arange(rows))[:, :, None]
    x = (left[:, None] + np.arange(cols))[:, None, :]
    frames[t, y, x] = frames[t, y, x] * (1 - alpha) + paint


def _pool(samples: np.ndarray, n: int) -> np.ndarray:
    """Mean over n x n blocks: [T, rows * n, cols * n] -> [T, rows, cols]."""
    if n == 1:
        return samples
    wide = samples.reshape(samples.shape[0], -1, n, samples.shape[2]).sum(axis=2)
    return wide.reshape(wide.shape[0], wide.shape[1], -1, n).sum(axis=3) / (n * n)
