"""Motion of the balls: exact free flight between exactly timed impacts. Knows nothing of words or pixels.

Between impacts every ball follows its parabola in closed form. Two balls in flight share one acceleration, so their
relative motion is a straight line and the time of their impact is the root of a quadratic too: no step size anywhere.
"""

from dataclasses import dataclass
from math import hypot, inf, sqrt

import numpy as np

from afd.config import PhysicsConstants
from afd.teachers.physics_scene import InitialState

MIN_REBOUND_SPEED = 0.02
"""Slowest rebound, boxes / s: a ball at rest hops by 2e-4 of the box instead of bouncing infinitely often."""

_MAX_IMPACTS = 100_000


@dataclass(frozen=True)
class Impact:
    """One collision: time in s, index of the ball, and what it hit: "floor", "ceiling", "wall" or "ball"."""

    time_s: float
    ball: int
    surface: str


@dataclass(frozen=True)
class Motion:
    """The world's truth about one clip.

    Args:
        position: [T, num_balls, 2] float64, (x, y) in box widths, y down.
        velocity: [T, num_balls, 2] float64, boxes / s.
        radius: [num_balls] float64, box widths.
        impacts: in order of time; a ball-ball impact is listed once for each ball.
    """

    position: np.ndarray
    velocity: np.ndarray
    radius: np.ndarray
    impacts: tuple[Impact, ...]


@dataclass
class _Body:
    x: float
    y: float
    vx: float
    vy: float
    r: float


def integrate(start: InitialState, constants: PhysicsConstants) -> Motion:
    """Follow the balls from `start` and record them at every frame time.

    Raises:
        ValueError: the start is not [num_balls, 2] / [num_balls], or a ball is not inside the box.
    """
    num_balls = len(start.radius)
    if start.position.shape != (num_balls, 2) or start.velocity.shape != (num_balls, 2):
        raise ValueError(
            f"start must hold position and velocity [{num_balls}, 2], got {start.position.shape}, "
            f"{start.velocity.shape}"
        )
    inside = (start.position >= start.radius[:, None]) & (start.position <= 1 - start.radius[:, None])
    if not inside.all():
        raise ValueError(f"position must keep every ball inside the unit box, got {start.position.tolist()}")
    bodies = [_Body(*map(float, (*start.position[i], *start.velocity[i], start.radius[i]))) for i in range(num_balls)]
    states = np.empty((constants.num_frames, num_balls, 4))
    impacts: list[Impact] = []
    now, frame = 0.0, 0
    while True:
        wait, first, surface = _next_impact(bodies, constants.gravity)
        while frame < constants.num_frames and frame / constants.fps <= now + wait:
            dt = frame / constants.fps - now
            for i, body in enumerate(bodies):
                states[frame, i] = _flown(body, dt, constants.gravity)
            frame += 1
        if frame == constants.num_frames:
            break
        for body in bodies:
            body.x, body.y, body.vx, body.vy = _flown(body, wait, constants.gravity)
        now += wait
        hit = range(num_balls) if surface == "ball" else (first,)
        impacts.extend(Impact(now, i, surface) for i in hit)
        assert len(impacts) < _MAX_IMPACTS, "the balls collide without end"
        if surface == "ball":
            _collide(bodies[0], bodies[1], constants.ball_restitution)
        else:
            _bounce(bodies[first], surface, constants.restitution)
    return Motion(states[..., :2], states[..., 2:], start.radius, tuple(impacts))


def _flown(body: _Body, dt: float, gravity: float) -> tuple[float, float, float, float]:
    """x, y, vx, vy after dt seconds of free flight."""
    return (
        body.x + body.vx * dt,
        body.y + body.vy * dt + 0.5 * gravity * dt * dt,
        body.vx,
        body.vy + gravity * dt,
    )


def _time_to_barrier(distance: float, speed: float, acceleration: float) -> float:
    """First t >= 0 at which a point `distance` (>= 0) in front of a barrier reaches it moving towards it, or inf.

    Solves d = s t + a t^2 / 2; the root with speed +sqrt(s^2 + 2 a d) at the barrier.
    """
    discriminant = speed * speed + 2 * acceleration * distance
    if discriminant < 0:
        return inf
    root = sqrt(discriminant)
    if speed > 0:
        return 2 * distance / (speed + root)
    return (root - speed) / acceleration if acceleration > 0 else inf


def _next_impact(bodies: list[_Body], gravity: float) -> tuple[float, int, str]:
    """Seconds to the next impact, the ball it happens to and what it hits."""
    best = (inf, -1, "")
    for i, body in enumerate(bodies):
        side = max(0.0, 1 - body.r - body.x) if body.vx > 0 else max(0.0, body.x - body.r)
        candidates = (
            (_time_to_barrier(max(0.0, 1 - body.r - body.y), body.vy, gravity), i, "floor"),
            (_time_to_barrier(max(0.0, body.y - body.r), -body.vy, -gravity), i, "ceiling"),
            (_time_to_barrier(side, abs(body.vx), 0.0), i, "wall"),
        )
        best = min(best, *candidates)
    if len(bodies) == 2:
        best = min(best, (_time_to_contact(*bodies), 0, "ball"))
    return best


def _time_to_contact(a: _Body, b: _Body) -> float:
    """First t >= 0 at which two approaching balls touch, or inf: |p + v t| = r_a + r_b."""
    px, py, vx, vy = b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy
    approach = px * vx + py * vy
    if approach >= 0:
        return inf
    speed2 = vx * vx + vy * vy
    gap = px * px + py * py - (a.r + b.r) ** 2
    discriminant = approach * approach - speed2 * max(gap, 0.0)
    return max(gap, 0.0) / (sqrt(discriminant) - approach) if discriminant >= 0 else inf


def _bounce(body: _Body, surface: str, restitution: float) -> None:
    """Reflect a ball at the box, in place."""
    if surface == "wall":
        body.x = 1 - body.r if body.vx > 0 else body.r
        body.vx *= -restitution
        return
    rebound = max(restitution * abs(body.vy), MIN_REBOUND_SPEED)
    body.y, body.vy = (1 - body.r, -rebound) if surface == "floor" else (body.r, rebound)


def _collide(a: _Body, b: _Body, restitution: float) -> None:
    """Exchange momentum along the line of centres, in place; mass is proportional to area."""
    nx, ny = b.x - a.x, b.y - a.y
    length = hypot(nx, ny)
    nx, ny = nx / length, ny / length
    approach = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny  # > 0
    separation = max(restitution * approach, MIN_REBOUND_SPEED)
    mass_a, mass_b = a.r**2, b.r**2
    impulse = (approach + separation) / (1 / mass_a + 1 / mass_b)
    a.vx, a.vy = a.vx - impulse / mass_a * nx, a.vy - impulse / mass_a * ny
    b.vx, b.vy = b.vx + impulse / mass_b * nx, b.vy + impulse / mass_b * ny
