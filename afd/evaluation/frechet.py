"""Frechet distance between two sets of videos, on fixed features that need no download.

The features are a random spatio-temporal convolution network with seeded weights. Random features rank nothing by
meaning, but two sets with the same distribution have the same features, and what moves, where, how fast and in which
colour all enter. Values compare only with values of the same features, the same video size and the same numbers of
videos: a finite sample adds a positive bias.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SEED = 20260521
_CHANNELS = (24, 48)
_GRID = (2, 2, 2)  # the features keep where and when, coarsely
NUM_FEATURES = 32
_BATCH = 16


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Args:
        mean_a, mean_b: [D].
        cov_a, cov_b: [D, D], symmetric, positive semi-definite; singular ones are fine.
    Returns:
        >= 0, computed in float64 by symmetric eigen-decompositions.
    Raises:
        ValueError: the shapes disagree.
    Source: Dowson and Landau 1982; arXiv 1706.08500 (as a distance of image sets).
    """
    size = len(mean_a)
    shapes = [tuple(each.shape) for each in (mean_a, cov_a, mean_b, cov_b)]
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"means and covariances must be [{size}] and [{size}, {size}], got {shapes}")
    a, b = cov_a.double(), cov_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    middle = root @ b @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean_a.double() - mean_b.double()).square().sum() + a.trace() + b.trace() - 2 * cross
    return max(0.0, float(distance))


@functools.cache
def _weights() -> tuple[Tensor, Tensor, Tensor]:
    """Two convolutions and an orthonormal projection, the same on every machine: drawn on the CPU from one seed."""
    generator = torch.Generator().manual_seed(_SEED)
    first = torch.randn(_CHANNELS[0], 3, 3, 3, 3, generator=generator) / (3 * 27) ** 0.5
    second = torch.randn(_CHANNELS[1], _CHANNELS[0], 3, 3, 3, generator=generator) / (_CHANNELS[0] * 27) ** 0.5
    width = _CHANNELS[1] * int(np.prod(_GRID))
    basis = torch.linalg.qr(torch.randn(width, NUM_FEATURES, generator=generator, dtype=torch.float64))[0]
    return first, second, basis


@torch.no_grad()
def video_features(videos: np.ndarray) -> Tensor:
    """Features [N, 32] float64 of videos [N, F, H, W, 3] float in [0, 1], F >= 3.

    Raises:
        ValueError: videos are not [N, F, H, W, 3], or too short.
    """
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[1] < 3:
        raise ValueError(f"videos must be [N, F, H, W, 3] with F >= 3, got {list(videos.shape)}")
    first, second, basis = _weights()
    parts = []
    for part in torch.from_numpy(np.ascontiguousarray(videos)).float().split(_BATCH):
        x = part.permute(0, 4, 1, 2, 3) - 0.5  # [N, 3, F, H, W]
        x = F.leaky_relu(F.conv3d(x, first, padding=1), 0.2)
        x = F.leaky_relu(F.conv3d(x, second, padding=1, stride=(1, 2, 2)), 0.2)
        x = F.adaptive_avg_pool3d(x, _GRID).flatten(1).double()
        parts.append(x @ basis)
    return torch.cat(parts)


def frechet_of_features(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features [N, D] and [M, D], in thousandths of a squared feature unit.

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a covariance needs at least 2 videos, got {len(features)} and {len(reference)}")
    fits = [(each.mean(dim=0), each.T.cov()) for each in (features, reference)]
    return 1000 * frechet_distance(*fits[0], *fits[1])


def frechet_video_distance(videos: np.ndarray, reference: np.ndarray) -> float:
    """`frechet_of_features` of two sets of videos [N, F, H, W, 3] and [M, F, H, W, 3] in [0, 1]."""
    return frechet_of_features(video_features(videos), video_features(reference))
