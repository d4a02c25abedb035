"""Counting balls and their overlaps: what the instrument reads on videos whose truth is known."""

import numpy as np
import pytest
import torch

from afd.config import PhysicsConstants
from afd.evaluation.counting import measure_counts
from afd.models.dct_codec import DCTCodec
from afd.teachers.physics import heldout_prompts, parse_prompt, render, simulate, training_prompts

WORLD = PhysicsConstants(fps=8, height=16, width=16, supersample=4, shading=False, noise=0.0)
PROMPTS = [*heldout_prompts(30), *training_prompts(30)]


def through_codec(frames: np.ndarray) -> np.ndarray:
    codec = DCTCodec()
    return codec.decode(codec.encode(torch.from_numpy(frames)[None].float() / 255)).numpy()[0]


def clip(prompt: str, *, shown: str | None = None) -> np.ndarray:
    scene = simulate(shown or prompt, 3, WORLD)
    colours = [ball.colour for ball in scene.balls]
    return through_codec(render(scene.motion.position, scene.motion.radius, colours, WORLD))


def test_true_videos_have_the_right_number_of_balls_which_do_not_overlap() -> None:
    rows = [measure_counts(clip(prompt), prompt) for prompt in PROMPTS]
    assert np.mean([row["count_fidelity"] for row in rows]) > 0.97
    errors = [row["collision_error"] for row in rows if row["collision_error"] == row["collision_error"]]
    assert len(errors) >= 3
    assert np.mean(errors) < 0.12, "frames fall between impacts, and two softened edges run into each other"


def test_a_missing_and_an_added_ball_are_wrong_counts() -> None:
    two = next(prompt for prompt in PROMPTS if len(parse_prompt(prompt)) == 2)
    one = two.split(" while ")[0]
    assert measure_counts(clip(two, shown=one), two)["count_fidelity"] == 0.0
    assert measure_counts(clip(one, shown=two), one)["count_fidelity"] == 0.0


def test_balls_that_pass_through_each_other_are_seen() -> None:
    prompt = "a small red ball is thrown right while a small cyan ball is thrown left"
    across = np.linspace(0.2, 0.8, 12)
    position = np.stack([np.stack([across, np.full(12, 0.5)], 1), np.stack([1 - across, np.full(12, 0.5)], 1)], 1)
    video = through_codec(render(position, np.array([0.095, 0.095]), ["red", "cyan"], WORLD))
    assert measure_counts(video, prompt)["collision_error"] > 0.5


def test_distant_balls_have_no_collision() -> None:
    prompt = "a small red ball is dropped while a small cyan ball is dropped"
    position = np.tile(np.array([[[0.2, 0.5], [0.8, 0.5]]]), (12, 1, 1))
    video = through_codec(render(position, np.array([0.095, 0.095]), ["red", "cyan"], WORLD))
    row = measure_counts(video, prompt)
    assert row["count_fidelity"] == 1.0
    assert row["collision_error"] != row["collision_error"]


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="video must be"):
        measure_counts(np.zeros((4, 4, 3)), "a small red ball is dropped")
