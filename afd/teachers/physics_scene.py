"""Words and scenes of the built-in world: constants, prompt grammar, prompt sets, initial conditions.

A prompt fixes colour, size, kind of motion and a band of speeds and heights; the seed draws the rest (start position,
exact speed, exact angle, exact radius). Leaves out how balls move (physics_simulation) and look (physics_render).
"""

import re
import zlib
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.14, 0.12),
    "green": (0.14, 0.80, 0.18),
    "blue": (0.18, 0.32, 1.00),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.85, 0.20, 0.90),
    "cyan": (0.10, 0.85, 0.92),
}
"""RGB in [0, 1] of a fully lit ball."""

RADII: dict[str, tuple[float, float]] = {"small": (0.09, 0.10), "large": (0.13, 0.14)}
"""Band of radii, in box widths."""

THROW_SPEEDS: dict[str, tuple[float, float]] = {"low": (0.28, 0.40), "medium": (0.50, 0.65), "high": (0.80, 1.00)}
"""Band of launch speeds of a thrown ball, in boxes per second."""

TOSS_SPEEDS: dict[str, tuple[float, float]] = {"low": (0.50, 0.62), "medium": (0.72, 0.84), "high": (0.94, 1.06)}
"""Band of launch speeds of a ball tossed up, in boxes per second."""

MOTIONS = ("dropped", "thrown left", "thrown right", "tossed up")
HEIGHTS = ("high up", "halfway")
_START_HEIGHT = {
    "dropped": (0.02, 0.30),
    "thrown": (0.20, 0.45),
    "crowded": (0.02, 0.55),
    "high up": (0.02, 0.12),
    "halfway": (0.38, 0.48),
}
_MARGIN = 0.02
_HELDOUT_SHARE = 0.25
_SPLIT_SEED = 20260521
_PROMPT_STREAM = 2**63 + 11  # no seed of a video
_BALL = re.compile(
    r"an? (?P<size>small|large) (?P<colour>" + "|".join(COLOURS) + r") ball is "
    r"(?:(?P<dropped>dropped)|thrown (?:to the )?(?P<side>left|right)|tossed (?P<up>up))"
    r"(?: at (?P<speed>low|medium|high) speed)?(?: from (?P<height>high up|halfway))?"
)


@dataclass(frozen=True)
class Ball:
    """What the prompt says about one ball; `speed` and `height` are None where the prompt is silent."""

    size: str
    colour: str
    motion: str
    speed: str | None = None
    height: str | None = None

    @property
    def phrase(self) -> str:
        """The ball's part of a prompt."""
        motion = self.motion.replace("thrown ", "thrown to the ")
        speed = f" at {self.speed} speed" if self.speed else ""
        height = f" from {self.height}" if self.height else ""
        return f"a {self.size} {self.colour} ball is {motion}{speed}{height}"


@dataclass(frozen=True)
class InitialState:
    """Drawn start of a scene: position, velocity [num_balls, 2] float64 (x, y) and radius [num_balls] float64."""

    position: np.ndarray
    velocity: np.ndarray
    radius: np.ndarray


def parse_prompt(prompt: str) -> tuple[Ball, ...]:
    """Read the one or two balls of a prompt.

    Raises:
        ValueError: the prompt is not a sentence of this world, or names one colour twice.
    """
    phrases = prompt.strip().lower().split(" while ")
    matches = [_BALL.fullmatch(phrase) for phrase in phrases]
    if len(phrases) > 2 or any(match is None for match in matches):
        raise ValueError(
            "prompt must read like 'a small red ball is thrown to the left at high speed' or join two such "
            f"phrases with 'while', got {prompt!r}"
        )
    balls = []
    for match in matches:
        assert match is not None
        motion = "dropped" if match["dropped"] else "tossed up" if match["up"] else f"thrown {match['side']}"
        balls.append(Ball(match["size"], match["colour"], motion, match["speed"], match["height"]))
    if len({ball.colour for ball in balls}) != len(balls):
        raise ValueError(f"prompt must give each ball its own colour, got {prompt!r}")
    return tuple(balls)


def prompt_vocabulary() -> tuple[str, ...]:
    """All words of all prompts, sorted."""
    ones, twos = _all_prompts()
    return tuple(sorted({word for prompt in (*ones, *twos) for word in prompt.split()}))


def _all_prompts() -> tuple[list[str], list[str]]:
    """Every sentence with one ball and every sentence with two, in a fixed order."""
    ones, twos = [], []
    for size, colour, motion in product(RADII, COLOURS, MOTIONS):
        speeds = (None,) if motion == "dropped" else tuple(THROW_SPEEDS)
        heights = (None,) if motion == "tossed up" else (None, *HEIGHTS)
        ones += [Ball(size, colour, motion, speed, height).phrase for speed, height in product(speeds, heights)]
    for (first, second), sizes, motions in product(
        permutations(COLOURS, 2), product(RADII, repeat=2), product(MOTIONS, repeat=2)
    ):
        left, right = (Ball(sizes[i], (first, second)[i], motions[i]).phrase for i in range(2))
        twos.append(f"{left} while {right}".replace("to the ", ""))
    return ones, twos


def _prompt_set(n: int, *, heldout: bool, field: str) -> list[str]:
    """The first n prompts of one side of the fixed split, every fifth with two balls."""
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    sides = []
    for prompts in _all_prompts():
        order = rng.permutation(len(prompts))
        cut = round(_HELDOUT_SHARE * len(prompts))
        sides.append([prompts[i] for i in (order[:cut] if heldout else order[cut:])])
    ones, twos = sides
    if not 0 <= n <= len(ones) + len(twos):
        raise ValueError(f"{field} must be in [0, {len(ones) + len(twos)}], as many as there are, got {n}")
    chosen: list[str] = []
    queue_one, queue_two = iter(ones), iter(twos)
    while len(chosen) < n:
        first, second = (queue_two, queue_one) if len(chosen) % 5 == 4 else (queue_one, queue_two)
        chosen.append(next(first, None) or next(second))
    return chosen


def training_prompts(n: int, *, field: str = "teacher.num_prompts") -> list[str]:
    """The first n training prompts, 80 % with one ball (until those run out): always the same, all distinct.

    Args:
        n: how many.
        field: where n comes from, for the message.
    Raises:
        ValueError: n is negative or larger than the set.
    """
    return _prompt_set(n, heldout=False, field=field)


def heldout_prompts(n: int) -> list[str]:
    """The first n prompts that are never in `training_prompts`: new combinations of the same words.

    Raises:
        ValueError: n is negative or larger than the set.
    """
    return _prompt_set(n, heldout=True, field="teacher.num_heldout_prompts")


def draw_initial_state(balls: tuple[Ball, ...], seed: int, prompt: str, *, spread: float = 1.0) -> InitialState:
    """Draw what the prompt leaves open; depends on (prompt, seed) and the spread alone.

    Args:
        balls: what the prompt says.
        seed, prompt: seed the draws.
        spread: in [0, 1]: 1 draws from the whole bands; 0 takes the prompt's own draw, the same for all seeds, so that
            single videos lose what is open but all prompts together do not.
    """
    rng = np.random.Generator(np.random.PCG64([seed % 2**64, zlib.crc32(prompt.encode())]))
    own = np.random.Generator(np.random.PCG64([_PROMPT_STREAM, zlib.crc32(prompt.encode())]))
    for _ in range(1000):
        uniforms = rng.random((len(balls), 5))
        if spread < 1:
            middle = own.random((len(balls), 5))
            uniforms = middle + spread * (uniforms - middle)
        draws = [_draw_ball(ball, each, crowded=len(balls) > 1) for ball, each in zip(balls, uniforms, strict=True)]
        position = np.array([draw[0] for draw in draws])  # [num_balls, 2]
        radius = np.array([draw[2] for draw in draws])
        if len(balls) == 1 or np.hypot(*(position[0] - position[1])) > radius.sum() + _MARGIN:
            return InitialState(position, np.array([draw[1] for draw in draws]), radius)
    raise AssertionError(f"no room for the balls of {prompt!r}")


def _draw_ball(
    ball: Ball, uniforms: np.ndarray, *, crowded: bool
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Position, velocity and radius of one ball from uniforms [5]; two thrown the same way need room (`crowded`)."""
    thinnest, thickest = RADII[ball.size]
    radius = thinnest + (thickest - thinnest) * uniforms[0]
    u, v, w, fall = uniforms[1:]
    if ball.motion == "tossed up":
        low, high = TOSS_SPEEDS[ball.speed or "medium"]
        speed, lean = low + (high - low) * u, np.radians(12.0 * (2 * v - 1))
        top, bottom = 0.62, 1 - radius - _MARGIN
        velocity = (speed * np.sin(lean), -speed * np.cos(lean))
    elif ball.motion == "dropped":
        velocity = (0.06 * (2 * u - 1), 0.0)
        top, bottom = (radius + offset for offset in _START_HEIGHT[ball.height or "dropped"])
    else:
        low, high = THROW_SPEEDS[ball.speed or "medium"]
        speed, angle = low + (high - low) * u, np.radians(-10.0 + 45.0 * v)
        side = -1.0 if ball.motion == "thrown left" else 1.0
        velocity = (side * speed * np.cos(angle), -speed * np.sin(angle))
        band = _START_HEIGHT["crowded" if crowded else ball.height or "thrown"]
        top, bottom = (radius + offset for offset in band)
    left, right = radius + _MARGIN, 1 - radius - _MARGIN
    if ball.motion.startswith("thrown"):
        left, right = (left, 0.35) if ball.motion == "thrown right" else (0.65, right)
    return (float(left + (right - left) * w), float(top + (bottom - top) * fall)), velocity, float(radius)
