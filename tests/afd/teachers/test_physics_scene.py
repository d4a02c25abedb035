"""Words, prompt sets and initial states of the built-in world."""

from typing import Any

import numpy as np
import pytest

from afd.config import PhysicsConstants
from afd.teachers.physics_scene import (
    RADII,
    THROW_SPEEDS,
    Ball,
    draw_initial_state,
    heldout_prompts,
    parse_prompt,
    prompt_vocabulary,
    training_prompts,
)


def test_prompt_round_trips_through_its_balls() -> None:
    for prompt in training_prompts(200) + heldout_prompts(64):
        balls = parse_prompt(prompt)
        if len(balls) == 1:
            assert balls[0].phrase == prompt
        else:
            assert " while ".join(ball.phrase for ball in balls).replace("to the ", "") == prompt


def test_parse_reads_every_word() -> None:
    assert parse_prompt("a small red ball is thrown to the left at high speed from high up") == (
        Ball("small", "red", "thrown left", "high", "high up"),
    )
    first, second = parse_prompt("A large blue ball is dropped while a small green ball is tossed up")
    assert (first.motion, second.motion) == ("dropped", "tossed up")
    assert (first.speed, second.height) == (None, None)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat", "prompt must read like"),
        ("", "prompt must read like"),
        ("a small red ball is eaten", "prompt must read like"),
        ("a small red ball is dropped while a large red ball is dropped", "its own colour"),
        (" while ".join(["a small red ball is dropped"] * 3), "prompt must read like"),
    ],
)
def test_parse_names_the_bad_prompt(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)


def test_prompt_sets_are_disjoint_distinct_deterministic_and_mixed() -> None:
    training, heldout = training_prompts(240), heldout_prompts(64)
    assert len(set(training)) == 240
    assert len(set(heldout)) == 64
    assert not set(training_prompts(1656)) & set(heldout_prompts(552))
    assert training == training_prompts(240)
    assert training[:50] == training_prompts(50)
    assert np.mean(["while" in prompt for prompt in training]) == pytest.approx(0.2)


def test_prompts_are_short_and_of_few_words() -> None:
    words = prompt_vocabulary()
    assert len(words) <= 60
    for prompt in training_prompts(1656) + heldout_prompts(552):
        assert len(prompt.split()) <= 16
        assert set(prompt.split()) <= set(words)


def test_prompt_set_rejects_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"teacher\.num_heldout_prompts must be in \[0, 552\], .* got 553"):
        heldout_prompts(553)


def test_every_prompt_has_a_start_inside_the_box_and_apart() -> None:
    for seed, prompt in enumerate(training_prompts(1656)):
        start = draw_initial_state(parse_prompt(prompt), seed, prompt)
        assert (start.position >= start.radius[:, None]).all()
        assert (start.position <= 1 - start.radius[:, None]).all()
        if len(start.radius) == 2:
            assert np.linalg.norm(start.position[0] - start.position[1]) > start.radius.sum()


def test_prompt_leaves_entropy_to_the_seed_within_its_bands() -> None:
    prompt = "a small red ball is thrown to the left at high speed"
    starts = [draw_initial_state(parse_prompt(prompt), seed, prompt) for seed in range(200)]
    speeds = np.array([np.linalg.norm(start.velocity[0]) for start in starts])
    radii = np.array([start.radius[0] for start in starts])
    low, high = THROW_SPEEDS["high"]
    assert speeds.min() >= low
    assert speeds.max() <= high
    assert speeds.std() > 0.03
    assert RADII["small"][0] <= radii.min() <= radii.max() <= RADII["small"][1]
    assert np.array([start.position[0] for start in starts]).std(axis=0).min() > 0.03
    assert all(start.velocity[0, 0] < 0 for start in starts)


def test_same_seed_and_prompt_same_start_other_seed_another() -> None:
    prompt = "a large cyan ball is dropped"
    first, again, other = (draw_initial_state(parse_prompt(prompt), seed, prompt) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.position, again.position)
    assert not np.array_equal(first.position, other.position)


@pytest.mark.parametrize(
    ("field", "value"), [("restitution", 1.2), ("fps", 0), ("duration_s", -1.0), ("noise", -0.1), ("background", 2.0)]
)
def test_constants_reject_nonsense(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        PhysicsConstants(**{field: value})


PAIR = "a small red ball is dropped while a small blue ball is dropped"


@pytest.mark.parametrize("prompt", ["a small red ball is dropped", PAIR])
def test_spread_says_how_much_a_prompt_leaves_open(prompt: str) -> None:
    def starts(spread: float) -> np.ndarray:
        drawn = [draw_initial_state(parse_prompt(prompt), seed, prompt, spread=spread) for seed in range(60)]
        return np.array([np.concatenate([each.position.ravel(), each.velocity.ravel()]) for each in drawn])

    fixed, some, whole = (starts(spread).std(axis=0) for spread in (0.0, 0.3, 1.0))
    assert (fixed < 1e-12).all()
    moving = whole > 0
    assert (some[moving] > 0).all()
    assert some[moving].mean() < 0.6 * whole[moving].mean()
    green = prompt.replace("red", "green")
    other = draw_initial_state(parse_prompt(green), 0, green, spread=0).position.ravel()
    assert not np.array_equal(other, starts(0.0)[0, : len(other)]), "prompts differ"
