"""Distribution matching on Gaussians, where both scores are known in closed form."""

import pytest
import torch
from torch import Tensor

from afd.train.dmd_objective import dmd_gradient


def posterior_mean(x_t: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, std^2) and x_t = (1 - t) x0 + t eps."""
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


def test_generator_reaches_the_teachers_mean_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    real_mean, real_std = torch.tensor(0.7), torch.tensor(0.5)
    mean, log_std = torch.tensor(-0.5, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)
    for _ in range(400):
        x0 = mean + log_std.exp() * torch.randn(64, 4, 3, 2, 2, generator=generator)
        with torch.no_grad():
            t = 0.02 + 0.96 * torch.rand(64, 1, 1, 1, 1, generator=generator)
            x_t = (1 - t) * x0 + t * torch.randn(x0.shape, generator=generator)
            fake = posterior_mean(x_t, t, mean, log_std.exp())
            slope = dmd_gradient(x0, fake, posterior_mean(x_t, t, real_mean, real_std))
        optimizer.zero_grad()
        (x0 * slope).mean().backward()
        optimizer.step()
    assert mean.item() == pytest.approx(0.7, abs=0.03)
    assert log_std.exp().item() == pytest.approx(0.5, abs=0.03)


def test_gradient_is_scaled_per_clip() -> None:
    x0 = torch.zeros(2, 1, 1, 1, 2)
    fake, real = torch.ones_like(x0), torch.stack([torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), -4.0)])
    assert dmd_gradient(x0, fake, real).flatten().tolist() == [1.0, 1.0, 1.25, 1.25]
