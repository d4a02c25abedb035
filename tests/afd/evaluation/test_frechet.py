"""The Frechet distance against other ways to compute it, and its features as an instrument."""

import numpy as np
import pytest
import torch

from afd.evaluation.frechet import NUM_FEATURES, frechet_distance, frechet_video_distance, video_features

PINNED = [-0.16369, 0.36465, 0.29980]  # of the first clip of moving_dots(seed=0)


def random_covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (5, 9), (12, 4)])
def test_distance_agrees_with_the_eigenvalues_of_the_product(size: int, rank: int) -> None:
    a, b = random_covariance(size, rank, 0), random_covariance(size, rank + 1, 1)
    mean_a, mean_b = torch.randn(2, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # A B has the eigenvalues of A^1/2 B A^1/2, without ever taking a root of a matrix.
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    expected = (mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * cross
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected.item(), abs=1e-6)


def test_distance_of_axis_aligned_gaussians_by_hand() -> None:
    # |(1, -2)|^2 + (2 - 1)^2 + (3 - 5)^2
    mean, zero = torch.tensor([1.0, -2.0]), torch.zeros(2)
    got = frechet_distance(mean, torch.diag(torch.tensor([4.0, 9.0])), zero, torch.diag(torch.tensor([1.0, 25.0])))
    assert got == pytest.approx(5.0 + 1.0 + 4.0, rel=1e-12)


def test_equal_gaussians_have_no_distance() -> None:
    cov = random_covariance(6, 3, 5)
    assert frechet_distance(torch.ones(6), cov, torch.ones(6), cov) < 1e-10


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must be \[2\] and \[2, 2\]"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


def moving_dots(count: int, *, seed: int, speed: float = 1.0, blue: float = 0.0) -> np.ndarray:
    """Clips [count, 8, 16, 16, 3] of a bright square that moves sideways."""
    rng = np.random.default_rng(seed)
    videos = np.zeros((count, 8, 16, 16, 3), np.float32)
    for video in videos:
        x, y = rng.uniform(0, 6), rng.integers(0, 12)
        for frame in range(8):
            left = int(x + speed * frame) % 13
            video[frame, y : y + 3, left : left + 3] = (1.0, 1.0 - blue, 1.0)
    return videos


def test_features_are_fixed_and_do_not_depend_on_the_batch() -> None:
    videos = moving_dots(19, seed=0)
    assert video_features(videos).shape == (19, NUM_FEATURES)
    assert (video_features(videos[3:5]) - video_features(videos)[3:5]).abs().max() < 1e-6  # float32
    assert video_features(videos[:1])[0, :3].tolist() == pytest.approx(PINNED, abs=1e-5)


def test_distance_sees_speed_and_colour_beyond_the_samples_own_noise() -> None:
    reference = moving_dots(96, seed=1)
    same = frechet_video_distance(moving_dots(96, seed=2), reference)
    faster = frechet_video_distance(moving_dots(96, seed=2, speed=2.0), reference)
    bluer = frechet_video_distance(moving_dots(96, seed=2, blue=0.5), reference)
    assert faster > 2 * same
    assert bluer > 2 * same


def test_videos_must_be_long_enough() -> None:
    with pytest.raises(ValueError, match=r"\[N, F, H, W, 3\] with F >= 3"):
        video_features(np.zeros((2, 2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="at least 2 videos, got 1 and 2"):
        frechet_video_distance(np.zeros((1, 4, 8, 8, 3), np.float32), np.zeros((2, 4, 8, 8, 3), np.float32))
