"""Motion measured without a world: known shifts, blur, flicker, and prompts that are nobody's world."""

import numpy as np
import pytest
import torch

from afd.config import RunConfig
from afd.distributed import World
from afd.evaluation.heldout import HeldoutEvaluator
from afd.evaluation.motion import METRICS, measure_motion
from afd.models.dct_codec import DCTCodec
from afd.types import VideoBatch


def texture(size: int = 96) -> np.ndarray:
    rng = np.random.default_rng(0)
    spectrum = np.fft.fft2(rng.standard_normal((size, size)))
    far = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    smooth = np.real(np.fft.ifft2(spectrum * np.exp(-((far / 0.08) ** 2))))
    return (smooth - smooth.min()) / np.ptp(smooth)


def clip(shifts: list[int]) -> np.ndarray:
    frames = [np.roll(texture(), shift, axis=1) for shift in shifts]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def test_dynamic_degree_is_the_true_shift() -> None:
    measured = measure_motion(clip([0, 3, 6, 9]))
    assert measured["dynamic_degree"] == pytest.approx(3.0, abs=0.25)  # the wrapped columns are wrong
    assert measured["motion_change"] < 0.1
    assert measure_motion(clip([0, 0, 0]))["dynamic_degree"] == pytest.approx(0.0, abs=1e-3)


def test_uneven_motion_has_more_change() -> None:
    assert measure_motion(clip([0, 1, 6, 7]))["motion_change"] > 0.5


def test_blur_lowers_sharpness_and_flicker_is_seen() -> None:
    video = clip([0, 1, 2])
    blurred = (video + np.roll(video, 4, axis=2)) / 2
    assert measure_motion(blurred)["sharpness"] < 0.9 * measure_motion(video)["sharpness"]
    flickering = video * np.array([1.0, 0.5, 1.0])[:, None, None, None]
    assert measure_motion(flickering)["brightness_flicker"] > 10 * measure_motion(video)["brightness_flicker"]


def test_tiny_and_single_frame_videos() -> None:
    tiny = measure_motion(np.zeros((3, 16, 16, 3)))
    assert tiny["dynamic_degree"] == pytest.approx(0.0, abs=1e-3)
    single = measure_motion(np.zeros((1, 16, 16, 3)))
    assert np.isnan(single["dynamic_degree"])
    assert single["sharpness"] == 0.0
    with pytest.raises(ValueError, match=r"video must be \[F, H, W, 3\], got \[3, 16, 16\]"):
        measure_motion(np.zeros((3, 16, 16)))


@pytest.mark.parametrize(
    ("prompt", "name"), [("a cat", "motion_change"), ("a small red ball is dropped", "gravity_error")]
)
def test_prompts_decide_what_is_measured(prompt: str, name: str) -> None:
    batch = VideoBatch(torch.arange(1), (prompt,), torch.zeros(1, 12, 12, 4, 4), torch.zeros(1, 16, 32))
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    summary = HeldoutEvaluator(batch, DCTCodec(), RunConfig(), world).evaluate_teacher()
    assert name in summary
    assert (set(summary) == set(METRICS)) == (prompt == "a cat")
