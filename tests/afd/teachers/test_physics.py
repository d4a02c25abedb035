"""The built-in teacher as a black box, and its batch renderer."""

import io

import numpy as np
import pytest

from afd.config import PhysicsConstants
from afd.teachers.base import FinishedVideo, Teacher
from afd.teachers.physics import PhysicsTeacher, render_scene, simulate, simulate_batch

PROMPT = "a small red ball is thrown to the left at high speed"
FAST = PhysicsConstants(fps=10, height=32, width=32, supersample=3, soft_edge=0.0, shading=False, noise=0.0)


def decode(mp4: bytes) -> tuple[np.ndarray, float]:
    import av

    with av.open(io.BytesIO(mp4), mode="r") as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        assert rate is not None
        assert stream.codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), float(rate)


def test_generate_returns_a_finished_video_of_the_scene() -> None:
    constants = PhysicsConstants()
    teacher: Teacher = PhysicsTeacher(constants)
    video = teacher.generate(PROMPT, 5)
    assert isinstance(video, FinishedVideo)
    assert (video.prompt, video.seed) == (PROMPT, 5)
    frames, rate = decode(video.mp4)
    assert frames.shape == (36, 64, 64, 3)
    assert rate == pytest.approx(24)
    truth = render_scene(simulate(PROMPT, 5, constants), constants, seed=5)
    assert np.abs(frames.astype(int) - truth.astype(int)).mean() < 3.0


def test_generate_is_reproducible_and_names_its_source() -> None:
    teacher = PhysicsTeacher()
    first, again, other = teacher.generate(PROMPT, 1), teacher.generate(PROMPT, 1), teacher.generate(PROMPT, 2)
    np.testing.assert_array_equal(decode(first.mp4)[0], decode(again.mp4)[0])
    assert first.source_id == again.source_id != other.source_id
    moon = PhysicsTeacher(PhysicsConstants(gravity=0.17)).generate(PROMPT, 1)
    assert moon.source_id != first.source_id


def test_generate_rejects_a_prompt_of_another_world() -> None:
    with pytest.raises(ValueError, match="prompt must read like"):
        PhysicsTeacher().generate("a panda drinks tea", 0)


def test_batch_equals_single_clips_and_takes_a_gravity_each() -> None:
    prompts = [PROMPT, "a large blue ball is dropped while a small green ball is tossed up"]
    frames = simulate_batch(prompts, [3, 4], FAST, gravities=[0.5, 1.5])
    assert frames.shape == (2, 15, 32, 32, 3)
    for i, gravity in enumerate((0.5, 1.5)):
        constants = FAST.model_copy(update={"gravity": gravity})
        np.testing.assert_array_equal(frames[i], render_scene(simulate(prompts[i], 3 + i, constants), constants))


def test_gravity_does_not_change_the_draws() -> None:
    earth, moon = (simulate(PROMPT, 9, FAST.model_copy(update={"gravity": gravity})).motion for gravity in (1.0, 0.2))
    np.testing.assert_array_equal(earth.position[0], moon.position[0])
    np.testing.assert_array_equal(earth.velocity[0], moon.velocity[0])
    assert not np.allclose(earth.position[5], moon.position[5])


def test_batch_rejects_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="must have one length, got 1, 2, 1"):
        simulate_batch([PROMPT], [1, 2], FAST)
