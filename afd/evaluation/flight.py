"""Free flight in tracked positions: where contacts may be, maximal runs between them, and their polynomial fits.

Contacts are found from the positions and the box alone, never from an assumed gravity: between two frames a ball may
have touched a surface if the way to it and back is not longer than what the ball covers in a neighbouring interval.
"""

from dataclasses import dataclass

import numpy as np

CONTACT_SLACK = 1.5
"""Factor on the neighbouring displacement: the ball may be faster at the contact than a frame before. At 10 fps and the
world's own gravity 3 of 419 impacts, all grazing, stay unmarked; at 1.25 it is 10."""

CONTACT_MARGIN = 0.02
"""Box widths added for the unknown radius and the pixel grid."""

MAX_STEP_SPEED = 2.0
"""Boxes / s: faster neighbouring steps are teleports and do not make a contact plausible."""


@dataclass(frozen=True)
class Contacts:
    """For each interval between consecutive frames, [F - 1, num_balls] bool: may the ball have touched it?"""

    floor: np.ndarray
    ceiling: np.ndarray
    wall: np.ndarray
    ball: np.ndarray


@dataclass(frozen=True)
class Fit:
    """Least squares y(t) = sum_k c_k t^k over one run: c [degree + 1], residual [n], t in s from the run's start."""

    coefficients: np.ndarray
    residual: np.ndarray

    @property
    def degrees_of_freedom(self) -> int:
        """Points minus coefficients."""
        return len(self.residual) - len(self.coefficients)


def find_contacts(position: np.ndarray, is_tracked: np.ndarray, radius: np.ndarray, *, fps: float) -> Contacts:
    """Mark the intervals in which a contact may have happened.

    Args:
        position: [F, num_balls, 2] in box widths, y down.
        is_tracked: [F, num_balls] bool.
        radius: [num_balls] in box widths.
        fps: frames per second.
    """
    limit = MAX_STEP_SPEED / fps
    step = np.abs(np.diff(position, axis=0)) * (is_tracked[1:] & is_tracked[:-1])[..., None]  # [F - 1, num_balls, 2]
    reach = CONTACT_SLACK * np.minimum(_neighbour_max(step), limit) + CONTACT_MARGIN
    x, y = position[..., 0], position[..., 1]

    def touched(gap: np.ndarray, way: np.ndarray) -> np.ndarray:
        gap = np.maximum(gap, 0.0)
        return np.less_equal(gap[1:] + gap[:-1], way)

    wall = touched(1 - radius - x, reach[..., 0]) | touched(x - radius, reach[..., 0])
    ball = np.zeros_like(wall)
    if len(radius) == 2:
        between = position[:, 1] - position[:, 0]
        both = np.asarray(is_tracked.all(axis=1))
        closing = np.linalg.norm(np.diff(between, axis=0), axis=-1) * (both[1:] & both[:-1])
        way = CONTACT_SLACK * np.minimum(_neighbour_max(closing), 2 * limit) + CONTACT_MARGIN
        near = touched(np.linalg.norm(between, axis=-1) - radius.sum(), way)
        ball |= (near & both[1:] & both[:-1])[:, None]
    return Contacts(touched(1 - radius - y, reach[..., 1]), touched(y - radius, reach[..., 1]), wall, ball)


def _neighbour_max(step: np.ndarray) -> np.ndarray:
    """Largest of the intervals before, at and after each interval (axis 0)."""
    best = step.copy()
    best[1:] = np.maximum(best[1:], step[:-1])
    best[:-1] = np.maximum(best[:-1], step[1:])
    return best


def flight_runs(is_tracked: np.ndarray, is_contact: np.ndarray, *, min_frames: int) -> list[slice]:
    """Maximal runs of consecutive frames of one ball that is tracked and touches nothing in between.

    Args:
        is_tracked: [F] bool.
        is_contact: [F - 1] bool.
        min_frames: shorter runs are left out.
    """
    runs, start = [], None
    for frame, tracked in enumerate(is_tracked):
        if start is not None and (not tracked or is_contact[frame - 1]):
            runs.append(slice(start, frame))
            start = None
        if start is None and tracked:
            start = frame
    if start is not None:
        runs.append(slice(start, len(is_tracked)))
    return [run for run in runs if run.stop - run.start >= min_frames]


def fit_polynomial(values: np.ndarray, degree: int, *, fps: float) -> Fit:
    """Fit values [n] sampled at fps with a polynomial in t - t_0, in seconds."""
    times = np.arange(len(values)) / fps
    design = times[:, None] ** np.arange(degree + 1)
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    return Fit(coefficients, values - design @ coefficients)
