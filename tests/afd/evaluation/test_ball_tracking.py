"""Ball tracks against the positions that were drawn."""

import numpy as np
import pytest

from afd.config import PhysicsConstants
from afd.evaluation.ball_tracking import track_balls
from afd.teachers.physics import heldout_prompts, render_scene, simulate


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 48), (30, 42)])
def test_positions_are_sub_pixel(height: int, width: int) -> None:
    constants = PhysicsConstants(
        fps=10, height=height, width=width, supersample=4, soft_edge=0.0, shading=False, noise=0.0
    )
    for seed, prompt in enumerate(heldout_prompts(30)):
        scene = simulate(prompt, seed, constants)
        tracks = track_balls(render_scene(scene, constants) / 255.0, scene.balls, background=0.08)
        error = np.abs(tracks.position - scene.motion.position) * [width, height]
        assert error.max() < 0.35, prompt
        assert np.sqrt((error**2).mean()) < 0.06, prompt
        assert tracks.is_visible.all(), prompt
        assert tracks.clutter.max() < 0.05, prompt


def test_mass_is_the_drawn_area_over_the_expected_one() -> None:
    constants = PhysicsConstants(fps=10, height=64, width=64, soft_edge=0.0, shading=False, noise=0.0)
    scene = simulate("a large blue ball is tossed up at low speed", 2, constants)
    tracks = track_balls(render_scene(scene, constants) / 255.0, scene.balls, background=0.08)
    expected = (scene.motion.radius[0] / tracks.radius[0]) ** 2
    assert tracks.mass[:, 0] == pytest.approx(expected, rel=0.03)


def test_nothing_is_tracked_in_an_empty_video() -> None:
    scene = simulate("a large blue ball is dropped", 0, PhysicsConstants())
    tracks = track_balls(np.full((5, 32, 32, 3), 0.08), scene.balls, background=0.08)
    assert not tracks.is_tracked.any()
    assert not tracks.is_visible.any()
    assert np.isnan(tracks.sharpness)
    assert np.isfinite(tracks.position).all()
