"""The physics metrics as instruments: what they read on worlds whose truth is set by the test.

Clips are 15 frames of 32 x 32 at 10 fps through the quick start's lossy codec, as the student's are.
"""

from functools import cache

import numpy as np
import pytest
import torch

from afd.config import PhysicsConstants
from afd.evaluation.physics import METRICS, measure, summarise
from afd.models.dct_codec import DCTCodec
from afd.teachers.physics import Scene, heldout_prompts, render, simulate, training_prompts

STUDENT = PhysicsConstants(fps=10, height=32, width=32, supersample=3, soft_edge=0.0, shading=False, noise=0.0)
PROMPTS = tuple(heldout_prompts(20) + training_prompts(20))


def through_codec(frames: np.ndarray) -> np.ndarray:
    codec = DCTCodec()
    return codec.decode(codec.encode(torch.from_numpy(frames).float() / 255)).numpy()


@cache
def scenes(gravity: float = 1.0) -> tuple[Scene, ...]:
    constants = PhysicsConstants(gravity=gravity, fps=10)
    return tuple(simulate(prompt, seed, constants) for seed, prompt in enumerate(PROMPTS))


def clips(move=lambda position: position, *, gravity: float = 1.0, constants: PhysicsConstants = STUDENT) -> np.ndarray:
    """Videos [N, 15, 32, 32, 3] of all scenes, with `move` applied to each scene's positions."""
    drawn = [
        render(move(s.motion.position), s.motion.radius, [ball.colour for ball in s.balls], constants)
        for s in scenes(gravity)
    ]
    return through_codec(np.stack(drawn))


def means(videos: np.ndarray, **truth: float) -> dict[str, float]:
    rows = [measure(video, prompt, fps=10, **truth) for video, prompt in zip(videos, PROMPTS, strict=True)]
    return {name: values["mean"] for name, values in summarise(rows).items()}


@cache
def truth_means() -> dict[str, float]:
    return means(clips())


@pytest.mark.parametrize("shading", [False, True])
def test_true_physics_reads_as_true(shading: bool) -> None:
    constants = PhysicsConstants(
        fps=10, height=32, width=32, supersample=3, soft_edge=0.01, shading=shading, noise=0.005
    )
    got = means(clips(constants=constants))
    assert got["gravity_error"] <= 0.05
    assert got["gravity_estimate"] == pytest.approx(1.0, abs=0.02)
    assert got["object_permanence"] >= 0.98
    assert got["trajectory_residual"] < 0.1
    assert got["largest_jump"] < 0.2
    assert got["energy_error"] < 0.02
    assert got["momentum_error"] < 0.03
    assert got["bounce_timing_error"] < 0.03
    assert got["direction_fidelity"] >= 0.97
    assert got["colour_fidelity"] > 0.8
    assert got["clutter"] < 0.03
    assert got["measured_share"] == 1.0


@pytest.mark.parametrize("factor", [0.0, 0.33, 0.66, 1.0, 1.5])
def test_gravity_error_reads_the_wrong_gravity(factor: float) -> None:
    got = means(clips(gravity=factor))
    assert got["gravity_error"] == pytest.approx(abs(factor - 1), abs=0.05)
    assert got["gravity_estimate"] == pytest.approx(factor, abs=0.05)
    if factor != 1.0:
        assert got["energy_error"] > 2 * truth_means()["energy_error"]
        assert got["bounce_timing_error"] > 5 * truth_means()["bounce_timing_error"]


def test_gravity_is_measured_against_the_given_truth() -> None:
    assert means(clips(gravity=1.5), gravity=1.5)["gravity_error"] < 0.05


def test_jitter_raises_residual_energy_and_momentum_errors() -> None:
    readings = [truth_means()]
    for pixels in (0.3, 0.6, 1.2):
        rng = np.random.default_rng(0)
        jitter = pixels / 32
        readings.append(means(clips(lambda p, s=jitter, r=rng: p + r.normal(0, s, p.shape))))
    for name in ("trajectory_residual", "largest_jump", "energy_error", "momentum_error"):
        values = [reading[name] for reading in readings]
        assert values == sorted(values)
        assert values[1] > 3 * values[0]
    assert readings[1]["trajectory_residual"] == pytest.approx(0.3 * np.sqrt(2), rel=0.15)


def test_teleport_breaks_the_fit_and_shows_as_a_jump() -> None:
    def teleport(position: np.ndarray) -> np.ndarray:
        moved = position.copy()
        moved[7:, 0, 0] = 1 - moved[7:, 0, 0]
        return moved

    got = means(clips(teleport))
    assert got["trajectory_residual"] > 10 * truth_means()["trajectory_residual"]
    assert got["largest_jump"] > 3.0
    assert got["object_permanence"] > 0.95


def test_vanished_ball_lowers_permanence_and_counts_in_gravity_error() -> None:
    half = clips()
    half[:, 8:] = STUDENT.background
    got = means(half)
    assert got["object_permanence"] == pytest.approx(8 / 15, abs=0.02)
    assert got["colour_fidelity"] < 0.6
    blank = measure(np.full_like(half[0], STUDENT.background), PROMPTS[0], fps=10)
    assert blank["gravity_error"] == 1.0
    assert blank["object_permanence"] == blank["dynamic_degree"] == blank["measured_share"] == 0.0
    assert np.isnan(blank["gravity_estimate"])
    assert np.isnan(blank["trajectory_residual"])


def test_one_missing_ball_of_two_counts() -> None:
    index = next(i for i, prompt in enumerate(PROMPTS) if "while" in prompt)
    scene = scenes()[index]
    frames = render(scene.motion.position[:, :1], scene.motion.radius[:1], [scene.balls[0].colour], STUDENT)
    got = measure(through_codec(frames[None])[0], PROMPTS[index], fps=10)
    assert got["object_permanence"] == 0.0
    assert got["measured_share"] == 0.5
    assert got["gravity_error"] > 0.02


def test_frozen_ball_reads_as_weightless_and_still() -> None:
    got = means(clips(lambda position: np.repeat(position[:1], len(position), axis=0)))
    assert got["gravity_error"] == pytest.approx(1.0, abs=0.01)
    assert got["dynamic_degree"] < 0.01
    assert got["direction_fidelity"] == 0.0
    assert got["trajectory_residual"] < 0.01
    assert got["object_permanence"] == 1.0


def test_dynamic_degree_is_the_mean_step_in_pixels() -> None:
    expected = np.mean([np.linalg.norm(np.diff(s.motion.position, axis=0), axis=-1).mean() * 32 for s in scenes()])
    assert truth_means()["dynamic_degree"] == pytest.approx(expected, rel=0.02)


def test_wrong_colour_and_wrong_direction_lower_fidelity() -> None:
    prompt = "a small red ball is thrown to the left at medium speed"
    scene = simulate(prompt, 1, PhysicsConstants(fps=10))
    right = render(scene.motion.position, scene.motion.radius, ["red"], STUDENT)
    purple = render(scene.motion.position, scene.motion.radius, ["purple"], STUDENT)
    good, mirrored, recoloured = (
        measure(video, prompt, fps=10) for video in through_codec(np.stack([right, right[:, :, ::-1], purple]))
    )
    assert good["direction_fidelity"] == good["object_permanence"] == 1.0
    assert mirrored["direction_fidelity"] == 0.0
    assert recoloured["object_permanence"] == 0.0
    assert recoloured["colour_fidelity"] == 0.0
    assert good["colour_fidelity"] > 0.9


def test_extra_ball_is_clutter() -> None:
    prompt = "a small red ball is dropped from high up"
    scene = simulate(prompt, 1, PhysicsConstants(fps=10))
    extra = np.concatenate([scene.motion.position, 1 - scene.motion.position], axis=1)[:6]
    frames = render(extra, np.repeat(scene.motion.radius, 2), ["red", "cyan"], STUDENT)
    got = measure(through_codec(frames[None])[0], prompt, fps=10)
    assert got["clutter"] == pytest.approx(1.0, abs=0.5)
    assert got["colour_fidelity"] < 0.7


def test_blur_lowers_sharpness_and_leaves_gravity() -> None:
    blurred = clips()
    for axis in (2, 3):
        blurred = (np.roll(blurred, 1, axis) + 2 * blurred + np.roll(blurred, -1, axis)) / 4
    got = means(blurred)
    assert got["sharpness"] < 0.8 * truth_means()["sharpness"]
    assert got["gravity_error"] < 0.05
    reference = truth_means()["sharpness"]
    assert means(clips(), reference_sharpness=reference)["sharpness"] == pytest.approx(1.0, rel=1e-6)


def test_no_two_metrics_are_the_same_and_none_is_constant() -> None:
    rng = np.random.default_rng(1)
    true = clips()
    noisy_other_prompt = np.clip(true[::-1] + rng.normal(0, 0.1, true.shape), 0, 1)
    jittered = clips(lambda position: position + rng.normal(0, 0.02, position.shape))
    videos = np.concatenate([true, jittered, clips(gravity=0.33), noisy_other_prompt])
    rows = [measure(video, PROMPTS[i % len(PROMPTS)], fps=10) for i, video in enumerate(videos)]
    table = {name: np.array([row[name] for row in rows]) for name in METRICS}
    for name, values in table.items():
        assert np.nanstd(values) > 1e-3, name
        for other in METRICS[: METRICS.index(name)]:
            assert not np.allclose(values, table[other], equal_nan=True), (name, other)


def test_summarise_counts_what_is_defined() -> None:
    nan = float("nan")
    got = summarise([{"a": 1.0, "b": nan}, {"a": 3.0, "b": 5.0}, {"a": 2.0, "b": nan}])
    assert got["a"] == {"mean": 2.0, "sem": pytest.approx(1 / np.sqrt(3)), "n": 3.0}
    assert got["b"]["mean"] == 5.0
    assert got["b"]["n"] == 1.0
    assert np.isnan(got["b"]["sem"])
    assert np.isnan(summarise([{"b": nan}])["b"]["mean"])
    assert summarise([]) == {}


def test_measure_rejects_bad_input() -> None:
    video = np.zeros((15, 32, 32, 3), dtype=np.float32)
    with pytest.raises(ValueError, match=r"video must be \[F, H, W, 3\], got \[15, 3, 32, 32\]"):
        measure(video.transpose(0, 3, 1, 2), PROMPTS[0], fps=10)
    with pytest.raises(ValueError, match="prompt must read like"):
        measure(video, "a cat", fps=10)
    with pytest.raises(ValueError, match="gravity must be positive, got 0"):
        measure(video, PROMPTS[0], fps=10, gravity=0)
    with pytest.raises(ValueError, match="finite values only"):
        measure(video * np.nan, PROMPTS[0], fps=10)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_very_short_videos_are_measured(num_frames: int) -> None:
    for video, prompt in zip(clips()[:5, :num_frames], PROMPTS, strict=False):
        got = measure(video, prompt, fps=10)
        assert set(got) == set(METRICS)
        assert got["object_permanence"] == 1.0
