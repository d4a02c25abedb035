"""How physical a video of the built-in world is: measured from its pixels, its prompt and the world's known truth.

| metric | unit | truth | undefined (NaN) when |
|---|---|---|---|
| gravity_error | relative | 0 | never: a ball without a measurable flight counts 1 |
| gravity_estimate | a / g | 1 | no ball has a measurable flight |
| trajectory_residual | px | 0 | no ball has a measurable flight |
| largest_jump | px | 0 | no ball is tracked in three frames in a row |
| energy_error | of g x box | 0 | no ball has a measurable flight clear of the walls |
| momentum_error | box / s | 0 | the same |
| bounce_timing_error | s | 0 | no bounce seen or due |
| dynamic_degree | px / frame | the teacher's | never: an absent ball moves 0 |
| object_permanence | share | 1 | never |
| colour_fidelity | share | 1 | never |
| direction_fidelity | share | 1 | never |
| clutter | ball areas | 0 | never |
| sharpness | of reference | the teacher's | no ball is tracked |
| measured_share | share of balls | 1 | never |

Nothing is dropped silently: `summarise` reports for each metric how many videos it was defined for. Leaves out finding
the balls (ball_tracking) and finding and fitting their flights (flight).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afd.evaluation.ball_tracking import BallTracks, track_balls
from afd.evaluation.flight import MAX_STEP_SPEED, Contacts, find_contacts, fit_polynomial, flight_runs
from afd.teachers.physics_scene import Ball, parse_prompt

METRICS = (
    "gravity_error",
    "gravity_estimate",
    "trajectory_residual",
    "largest_jump",
    "energy_error",
    "momentum_error",
    "bounce_timing_error",
    "dynamic_degree",
    "object_permanence",
    "colour_fidelity",
    "direction_fidelity",
    "clutter",
    "sharpness",
    "measured_share",
)

MIN_FLIGHT_FRAMES = 4
MAX_GRAVITY_ERROR = 3.0
"""One flight's error counts at most this much, so that a single glitch does not decide a mean."""

DIRECTION_TIME_S = 0.3
_LEAST_SIDE_STEP = 0.03
_LEAST_VERTICAL_STEP = 0.015
_TIMING_FRAMES = 5


@dataclass(frozen=True)
class WorldTruth:
    """What is known about the world and the video format.

    Args:
        fps: frames per second of the video.
        gravity: boxes / s^2, positive.
        restitution: speed kept at the floor, in (0, 1].
        background: grey level of the background in [0, 1].
        reference_sharpness: of the teacher's clips through the same path, 1 / px; 1 leaves `sharpness` in 1 / px.
    """

    fps: float
    gravity: float = 1.0
    restitution: float = 0.8
    background: float = 0.08
    reference_sharpness: float = 1.0

    def __post_init__(self) -> None:
        for name in ("fps", "gravity", "restitution", "reference_sharpness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def measure(
    video: np.ndarray,
    prompt: str,
    *,
    fps: float,
    gravity: float = 1.0,
    restitution: float = 0.8,
    background: float = 0.08,
    reference_sharpness: float = 1.0,
) -> dict[str, float]:
    """Measure one video; see the module's table, and `WorldTruth` for the keyword arguments.

    Args:
        video: [F, H, W, 3] float in [0, 1].
        prompt: a sentence of the built-in world; it names the balls.
    Returns:
        {metric: value} for every name in `METRICS`; NaN where undefined.
    Raises:
        ValueError: video is not [F, H, W, 3] or not finite, the prompt is not of this world, or a truth is not
            positive.
    """
    truth = WorldTruth(fps, gravity, restitution, background, reference_sharpness)
    balls = parse_prompt(prompt)
    tracks = track_balls(video, balls, background=background)
    contacts = find_contacts(tracks.position, tracks.is_tracked, tracks.radius, fps=fps)
    pixels = np.array([video.shape[2], video.shape[1]], dtype=np.float64)
    values = {
        **_flight_metrics(tracks, contacts, truth, pixels),
        **_motion_metrics(tracks, contacts, truth, pixels),
        **_appearance_metrics(tracks, truth),
        "bounce_timing_error": _bounce_timing_error(tracks, contacts, truth),
        "direction_fidelity": _direction_fidelity(tracks, balls, truth),
    }
    return {name: float(values[name]) for name in METRICS}


def summarise(measurements: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard error and count of each metric over the videos for which it is defined.

    Returns:
        {metric: {"mean", "sem", "n"}}; mean is NaN for n = 0, sem for n < 2.
    """
    summary = {}
    for name in dict.fromkeys(key for row in measurements for key in row):
        values = np.array([row[name] for row in measurements if name in row], dtype=np.float64)
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else float("nan")
        sem = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        summary[name] = {"mean": mean, "sem": sem, "n": float(len(values))}
    return summary


def _flight_metrics(tracks: BallTracks, contacts: Contacts, truth: WorldTruth, pixels: np.ndarray) -> dict[str, float]:
    """Gravity, residuals, energy and momentum in free flight.

    A vertical run ends at the floor, the ceiling or another ball: a side wall does not act on y. A clear run ends at
    the walls too. Over n frames a quadratic's acceleration has variance ~ 1 / (n (n^2 - 1) (n^2 - 4)); the runs of a
    ball, and the balls of a video, are weighted by the inverse, and a ball without a run enters with the weight of a
    run of half the video.
    """
    num_frames, num_balls, _ = tracks.position.shape
    errors, estimates, weights, ball_measured = [], [], [], []
    vertical, horizontal, energy, momentum = _Pool(), _Pool(), _Pool(), _Pool()
    for i in range(num_balls):
        blocked = contacts.floor[:, i] | contacts.ceiling[:, i] | contacts.ball[:, i]
        runs = flight_runs(tracks.is_tracked[:, i], blocked, min_frames=MIN_FLIGHT_FRAMES)
        ball_measured.append(bool(runs))
        for run in runs:
            fit = fit_polynomial(tracks.position[run, i, 1], 2, fps=truth.fps)
            estimates.append(2 * fit.coefficients[2] / truth.gravity)
            errors.append(min(abs(estimates[-1] - 1), MAX_GRAVITY_ERROR))
            weights.append(_acceleration_weight(run.stop - run.start))
            vertical.add(fit.residual * pixels[1], fit.degrees_of_freedom)
        if not runs:
            errors.append(1.0)
            estimates.append(float("nan"))
            weights.append(_acceleration_weight(max(MIN_FLIGHT_FRAMES, num_frames // 2)))
        clear = flight_runs(tracks.is_tracked[:, i], blocked | contacts.wall[:, i], min_frames=MIN_FLIGHT_FRAMES)
        for run in clear:
            position = tracks.position[run, i]
            fit = fit_polynomial(position[:, 0], 1, fps=truth.fps)
            horizontal.add(fit.residual * pixels[0], fit.degrees_of_freedom)
            velocity = np.diff(position, axis=0) * truth.fps  # [n - 1, 2]
            height = -(position[1:, 1] + position[:-1, 1]) / 2
            total = 0.5 * (velocity**2).sum(axis=1) / truth.gravity + height
            energy.add(total - total.mean(), len(total) - 1)
            momentum.add(velocity[:, 0] - velocity[:, 0].mean(), len(velocity) - 1)
    estimate, weight = np.array(estimates), np.array(weights)
    seen = ~np.isnan(estimate)
    return {
        "gravity_error": float(np.average(errors, weights=weight)),
        "gravity_estimate": float(np.average(estimate[seen], weights=weight[seen])) if seen.any() else float("nan"),
        "trajectory_residual": float(np.sqrt(vertical.mean_square + (horizontal.mean_square if horizontal.n else 0.0))),
        "energy_error": float(np.sqrt(energy.mean_square)),
        "momentum_error": float(np.sqrt(momentum.mean_square)),
        "measured_share": float(np.mean(ball_measured)),
    }


@dataclass
class _Pool:
    """Pooled mean square: sum of squares over degrees of freedom; NaN while empty."""

    squares: float = 0.0
    n: int = 0

    def add(self, residual: np.ndarray, degrees_of_freedom: int) -> None:
        self.squares += float((residual**2).sum())
        self.n += degrees_of_freedom

    @property
    def mean_square(self) -> float:
        return self.squares / self.n if self.n else float("nan")


def _acceleration_weight(n: int) -> float:
    """Inverse variance, up to a constant, of the acceleration fitted to n frames."""
    return n * (n**2 - 1.0) * (n**2 - 4.0)


def _motion_metrics(tracks: BallTracks, contacts: Contacts, truth: WorldTruth, pixels: np.ndarray) -> dict[str, float]:
    """Mean displacement, and the largest step that neither inertia, gravity nor another ball explains.

    Per axis a step may exceed the larger of the two steps before it by what gravity adds (twice g dt^2, since the step
    before may hold a bounce); the excess over that is a jump, whatever is near. The first steps of a track have no
    steps before them and are judged by `trajectory_residual` alone; a step above the world's top speed always counts.
    """
    step = np.abs(np.diff(tracks.position, axis=0))  # [F - 1, num_balls, 2]
    has_step = tracks.is_tracked[1:] & tracks.is_tracked[:-1]
    moved = np.linalg.norm(step * pixels, axis=-1)
    degrees = [float(moved[has_step[:, i], i].mean()) if has_step[:, i].any() else 0.0 for i in range(step.shape[1])]
    dt = 1 / truth.fps
    allowed = np.full_like(step, MAX_STEP_SPEED * dt)
    usual = np.maximum(step[1:-1], step[:-2]) + np.array([0.0, 2 * truth.gravity * dt * dt])
    # An impact of two balls sets a new speed, which shows an interval or, after a wall, two intervals later.
    struck = contacts.ball[2:] | contacts.ball[1:-1] | contacts.ball[:-2]
    allowed[2:] = np.where(struck[..., None], allowed[2:], np.minimum(usual, allowed[2:]))
    judged = has_step.copy()
    judged[2:] &= has_step[1:-1] & has_step[:-2]
    judged[:2] = False
    excess = np.maximum(step - allowed, 0.0) * pixels
    jump = float(np.linalg.norm(excess, axis=-1)[judged].max()) if judged.any() else float("nan")
    return {"dynamic_degree": float(np.mean(degrees)), "largest_jump": jump}


def _appearance_metrics(tracks: BallTracks, truth: WorldTruth) -> dict[str, float]:
    """Presence, colour, clutter and sharpness."""
    shown = np.minimum(tracks.mass, 1.0).clip(0.0) * tracks.is_visible  # [F, num_balls]
    area = tracks.radius**2 / (tracks.radius**2).sum()
    return {
        "object_permanence": float(tracks.is_visible.all(axis=1).mean()),
        "colour_fidelity": float(((shown @ area) / (1.0 + tracks.clutter)).mean()),
        "clutter": float(tracks.clutter.mean()),
        "sharpness": tracks.sharpness / truth.reference_sharpness,
    }


def _direction_fidelity(tracks: BallTracks, balls: Sequence[Ball], truth: WorldTruth) -> float:
    """Share of balls whose first 0.3 s go the way the prompt says; a ball not tracked at both ends does not."""
    later = min(len(tracks.position) - 1, max(1, round(DIRECTION_TIME_S * truth.fps)))
    hits = []
    for i, ball in enumerate(balls):
        right, down = tracks.position[later, i] - tracks.position[0, i]
        agrees = {
            "thrown left": right < -_LEAST_SIDE_STEP,
            "thrown right": right > _LEAST_SIDE_STEP,
            "tossed up": down < -_LEAST_VERTICAL_STEP,
            "dropped": down > _LEAST_VERTICAL_STEP and abs(right) < abs(down) + _LEAST_SIDE_STEP,
        }[ball.motion]
        hits.append(bool(agrees and tracks.is_tracked[0, i] and tracks.is_tracked[later, i]))
    return float(np.mean(hits))


def _bounce_timing_error(tracks: BallTracks, contacts: Contacts, truth: WorldTruth) -> float:
    """Mean |seen - due| in s of the first floor bounce of each ball.

    Due: the first five frames, fitted with the true gravity, reach the floor. Seen: the bottom turning point near the
    floor, placed within its interval by the ways down and up (the way up is slower by the restitution). Defined for a
    ball tracked from the start that touches nothing else before or around the bounce, when one of the two lies in the
    clip; one that is due or seen alone is compared with the end of the clip.
    """
    num_frames = len(tracks.position)
    end = (num_frames - 1) / truth.fps
    errors = []
    for i in range(tracks.position.shape[1]):
        y = tracks.position[:, i, 1]
        others = contacts.ceiling[:, i] | contacts.ball[:, i]
        start = flight_runs(tracks.is_tracked[:, i], others | contacts.floor[:, i], min_frames=_TIMING_FRAMES)
        if not start or start[0].start != 0:
            continue
        stop = start[0].stop - 1
        nearby = slice(max(stop - 1, 0), stop + 4)
        if others[nearby].any() or not tracks.is_tracked[nearby, i].all():
            continue
        floor = 1 - float(tracks.radius[i])
        due = min(_due_time(y[:_TIMING_FRAMES], floor, truth), end)
        seen = _seen_time(y, stop, floor, truth)
        if seen is None and due > end - 1 / truth.fps:
            continue
        errors.append(abs(due - (end if seen is None else seen)))
    return float(np.mean(errors)) if errors else float("nan")


def _due_time(y: np.ndarray, floor: float, truth: WorldTruth) -> float:
    """Seconds from frame 0 until the parabola with the true gravity through y [n] reaches the floor."""
    times = np.arange(len(y)) / truth.fps
    fit = fit_polynomial(y - 0.5 * truth.gravity * times**2, 1, fps=truth.fps)
    start, speed = fit.coefficients
    return float((np.sqrt(max(speed**2 + 2 * truth.gravity * (floor - start), 0.0)) - speed) / truth.gravity)


def _seen_time(y: np.ndarray, stop: int, floor: float, truth: WorldTruth) -> float | None:
    """Seconds from frame 0 to the turning point at the floor in one of the three intervals from `stop`, or None."""
    for k in range(max(stop, 1), min(stop + 3, len(y) - 2)):
        if y[k] > y[k - 1] and y[k + 2] < y[k + 1]:
            down, up = max(floor - y[k], 0.0), max(floor - y[k + 1], 0.0) / truth.restitution
            share = down / (down + up) if down + up > 0 else 0.5
            return (k + share) / truth.fps
    return None
