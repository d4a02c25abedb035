"""The built-in teacher: a procedural black-box world of balls under gravity that returns finished videos only.

Its true physics is known, so "did the student learn physics" is measured exactly (afd/evaluation/physics.py).
Leaves out the parts: words and scenes (physics_scene), motion (physics_simulation), pixels (physics_render).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from afd.config import PhysicsConstants
from afd.teachers.base import FinishedVideo
from afd.teachers.frames import encode_mp4
from afd.teachers.physics_render import render
from afd.teachers.physics_scene import (
    COLOURS,
    RADII,
    Ball,
    InitialState,
    draw_initial_state,
    heldout_prompts,
    parse_prompt,
    prompt_vocabulary,
    training_prompts,
)
from afd.teachers.physics_simulation import Impact, Motion, integrate

__all__ = [
    "COLOURS",
    "RADII",
    "Ball",
    "Impact",
    "InitialState",
    "Motion",
    "PhysicsTeacher",
    "Scene",
    "heldout_prompts",
    "parse_prompt",
    "prompt_vocabulary",
    "render",
    "render_scene",
    "simulate",
    "simulate_batch",
    "training_prompts",
]


@dataclass(frozen=True)
class Scene:
    """The truth behind one clip: what the prompt says (`balls`) and how they moved (`motion`)."""

    balls: tuple[Ball, ...]
    motion: Motion


def simulate(prompt: str, seed: int, constants: PhysicsConstants) -> Scene:
    """Draw what the prompt leaves open from the seed and follow the balls.

    Raises:
        ValueError: the prompt is not a sentence of this world.
    """
    balls = parse_prompt(prompt)
    return Scene(balls, integrate(draw_initial_state(balls, seed, prompt, spread=constants.spread), constants))


def render_scene(scene: Scene, constants: PhysicsConstants, *, seed: int = 0) -> np.ndarray:
    """Draw a scene: [T, height, width, 3] uint8."""
    colours = [ball.colour for ball in scene.balls]
    return render(scene.motion.position, scene.motion.radius, colours, constants, seed=seed)


def simulate_batch(
    prompts: Sequence[str],
    seeds: Sequence[int],
    constants: PhysicsConstants,
    *,
    gravities: Iterable[float] | None = None,
) -> np.ndarray:
    """Simulate and draw many clips, each with its own gravity if `gravities` is given.

    Returns:
        [N, T, height, width, 3] uint8.
    Raises:
        ValueError: the lengths disagree, or a prompt is not a sentence of this world.
    """
    pulls = [constants.gravity] * len(prompts) if gravities is None else list(gravities)
    if not len(prompts) == len(seeds) == len(pulls):
        raise ValueError(
            f"prompts, seeds and gravities must have one length, got {len(prompts)}, {len(seeds)}, {len(pulls)}"
        )
    frames = np.empty((len(prompts), constants.num_frames, constants.height, constants.width, 3), dtype=np.uint8)
    for i, (prompt, seed, pull) in enumerate(zip(prompts, seeds, pulls, strict=True)):
        pulled = constants.model_copy(update={"gravity": float(pull)})
        frames[i] = render_scene(simulate(prompt, seed, pulled), constants, seed=seed)
    return frames


class PhysicsTeacher:
    """A black box: `generate(prompt, seed)` returns a finished H.264 video and nothing else."""

    def __init__(self, constants: PhysicsConstants | None = None) -> None:
        self._constants = constants or PhysicsConstants()
        self._name = hashlib.sha256(self._constants.model_dump_json().encode()).hexdigest()[:8]

    def generate(self, prompt: str, seed: int) -> FinishedVideo:
        """Simulate, draw and encode one clip; the same (prompt, seed) gives the same frames.

        Raises:
            ValueError: the prompt is not a sentence of this world.
        """
        frames = render_scene(simulate(prompt, seed, self._constants), self._constants, seed=seed)
        mp4 = encode_mp4(frames, fps=self._constants.fps, crf=self._constants.crf)
        return FinishedVideo(prompt, seed, mp4, self.source_id(prompt, seed))

    @property
    def version(self) -> str:
        """Fingerprint of the world's constants."""
        return self._name

    def source_id(self, prompt: str, seed: int) -> str:
        """The name of a video, known before it is made."""
        return f"physics-{self._name}-{hashlib.sha256(f'{prompt}{chr(10)}{seed}'.encode()).hexdigest()[:16]}"
