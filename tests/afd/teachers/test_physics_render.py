"""Pixels of the built-in world."""

import numpy as np
import pytest

from afd.config import PhysicsConstants
from afd.teachers.physics_render import render
from afd.teachers.physics_scene import COLOURS

HARD = PhysicsConstants(height=32, width=32, supersample=3, soft_edge=0.0, shading=False, noise=0.0)


def alpha_of(frames: np.ndarray, colour: str) -> np.ndarray:
    """Coverage [T, H, W] of one ball, from the pixels."""
    background = round(255 * HARD.background) / 255
    contrast = np.array(COLOURS[colour]) - background
    return (frames / 255 - background) @ contrast / (contrast @ contrast)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_disc_has_its_area_and_centre(height: int, width: int) -> None:
    constants = PhysicsConstants(height=height, width=width, supersample=8, soft_edge=0.0, shading=False, noise=0.0)
    centre = np.array([[[0.37, 0.52]], [[0.11, 0.89]], [[0.9, 0.1]]])
    alpha = alpha_of(render(centre, np.array([0.1]), ["blue"], constants), "blue")
    assert alpha.sum(axis=(1, 2)) == pytest.approx(np.pi * 0.01 * height * width, rel=0.02)
    x = (alpha.sum(axis=1) @ (np.arange(width) + 0.5)) / alpha.sum(axis=(1, 2)) / width
    y = (alpha.sum(axis=2) @ (np.arange(height) + 0.5)) / alpha.sum(axis=(1, 2)) / height
    np.testing.assert_allclose(np.stack([x, y], axis=1), centre[:, 0], atol=2e-3)


def test_background_is_constant_away_from_the_ball() -> None:
    frames = render(np.array([[[0.2, 0.2]]]), np.array([0.1]), ["red"], HARD)
    assert frames.dtype == np.uint8
    assert (frames[0, 16:, 16:] == round(255 * HARD.background)).all()


def test_two_balls_keep_their_colours() -> None:
    frames = render(np.array([[[0.25, 0.5], [0.75, 0.5]]]), np.array([0.1, 0.14]), ["yellow", "purple"], HARD)
    np.testing.assert_allclose(frames[0, 16, 8] / 255, COLOURS["yellow"], atol=0.01)
    np.testing.assert_allclose(frames[0, 16, 24] / 255, COLOURS["purple"], atol=0.01)


def test_shading_lights_the_upper_left() -> None:
    constants = PhysicsConstants(noise=0.0)
    frames = render(np.array([[[0.5, 0.5]]]), np.array([0.14]), ["green"], constants).astype(int)
    assert frames[0, 28, 28].sum() > frames[0, 36, 36].sum() + 60


def test_noise_comes_from_the_seed() -> None:
    constants = PhysicsConstants(noise=0.02)
    args = (np.array([[[0.5, 0.5]]]), np.array([0.1]), ["cyan"], constants)
    np.testing.assert_array_equal(render(*args, seed=1), render(*args, seed=1))
    assert not np.array_equal(render(*args, seed=1), render(*args, seed=2))


def test_render_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"position must be \[T, 1, 2\]"):
        render(np.zeros((4, 2)), np.array([0.1]), ["red"], HARD)
    with pytest.raises(ValueError, match=r"colours must be among .* got \['pink'\]"):
        render(np.zeros((4, 1, 2)), np.array([0.1]), ["pink"], HARD)
