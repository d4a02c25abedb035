"""The student's update: noise coupled to the rollout's own, and where negative-aware flow matching comes to rest."""

import math

import pytest
import torch
from torch import Tensor

from afd.config import NFTSection, StudentShape
from afd.distributed import seeded_generator
from afd.models.student import CausalStudent
from afd.rollout import SamplerTimes, last_step_noise, rollout
from afd.train.student_update import make_noised_states
from afd.types import Rollout
from afd_kernels import nft_loss

SHAPE = StudentShape(num_layers=1, num_heads=2, head_dim=12, ffn_dim=16, freq_dim=8, chunk_frames=2)


def rollout_of(latents: Tensor, noise: Tensor | None) -> Rollout:
    ids = torch.arange(len(latents))
    return Rollout(latents, torch.zeros(len(latents), 1, 32), ids, ids, noise)


def coupled_states(clips: Rollout, rho: float, times: SamplerTimes):
    generators = [seeded_generator(row) for row in range(len(clips.latents))]
    section = NFTSection(noise_coupling=rho)
    return make_noised_states(clips, generators, section, times=times, shift=1.0, shape=SHAPE)


@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0])
def test_coupled_noise_is_standard_normal_and_correlates_with_the_rollouts(rho: float) -> None:
    own = torch.randn(64, 12, 4, 6, 6, generator=seeded_generator(1))
    states = coupled_states(rollout_of(torch.zeros_like(own), own), rho, SamplerTimes((1.0,)))
    eps = states.x_t  # at t = 1
    sigma = 1 / math.sqrt(eps.numel())
    assert eps.square().mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(2) * sigma)
    assert (eps * own).mean().item() == pytest.approx(rho, abs=5 * sigma)


def test_coupled_noise_must_have_been_kept() -> None:
    with pytest.raises(ValueError, match=r"rollout\.noise must be kept for noise_coupling 0\.5, got None"):
        coupled_states(rollout_of(torch.zeros(2, 12, 4, 4, 4), None), 0.5, SamplerTimes((1.0,)))


def test_a_fully_coupled_one_step_student_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    student = CausalStudent(SHAPE).double()
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    times, prompt = SamplerTimes((1.0,)), torch.randn(3, 5, 32, dtype=torch.float64)
    noise = torch.randn(3, 1, 12, 6, 4, 4, dtype=torch.float64)
    made = rollout(student, prompt, noise, times)
    errors = {}
    for rho in (0.0, 0.9, 1.0):
        states = coupled_states(rollout_of(made, last_step_noise(noise, times, SHAPE)), rho, times)
        v = student(states.x_t, states.t.double(), prompt, clean=states.clean)
        weight = torch.tensor([0.9, 0.1, 0.4], dtype=torch.float64)
        loss = nft_loss(
            v, None, states.v_target, states.t, weight, nft_beta=0.5, v_ref=None, prior_weight=0.0, variant="plain",
            advantage_clip=5.0,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(loss.sum(), v)
        errors[rho] = slope.abs().max().item()
    assert errors[1.0] < 1e-12
    assert errors[0.0] > errors[0.9] > 0.01 * errors[0.0]


def test_last_step_noise_follows_each_chunks_own_number_of_steps() -> None:
    noise = torch.randn(2, 3, 12, 6, 4, 4)
    own = last_step_noise(noise, SamplerTimes((1.0, 0.5), first_chunk_times=(1.0, 0.7, 0.4)), SHAPE)
    assert torch.equal(own[:, :, :2], noise[:, 2, :, :2])
    assert torch.equal(own[:, :, 2:], noise[:, 1, :, 2:])


MODES, STD = torch.tensor([1.0, -1.0], dtype=torch.float64), 0.3


def mixture_velocity(x_t: Tensor, t: float, share: Tensor) -> Tensor:
    """E[eps - x0 | x_t] of a mixture of two Gaussians, from the score of its noised marginal (autograd)."""
    x = x_t.clone().requires_grad_()
    variance = ((1 - t) * STD) ** 2 + t**2
    log_p = (share.log() - (x[:, None] - (1 - t) * MODES) ** 2 / (2 * variance)).logsumexp(dim=1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    x0 = (x_t + t**2 * score) / (1 - t)  # Tweedie
    return (x_t - x0) / t


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_negative_aware_matching_rests_at_the_reweighted_mixture(beta: float) -> None:
    """The rollouts are a two-mode mixture with v_old its velocity; the weight prefers one mode.

    Setting the derivative to zero: v = v_old + 2 E[w | x_t] (v_w - v_old) / beta, where v_w is the velocity of the
    mixture reweighted by w, because v_old = E[v* | x_t]. Expectations over x0 given x_t are Gauss-Hermite sums.
    """
    t, share, weight = 0.6, torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([0.9, 0.2], dtype=torch.float64)
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    v_old = mixture_velocity(x_t, t, share)
    posterior, x0 = posterior_samples(x_t, t, share)  # [9, 2, S]
    v_target = (x_t[:, None, None] - x0) / t
    v = torch.zeros_like(x_t).requires_grad_()
    count = x0[0].numel()

    def spread(each: Tensor) -> Tensor:  # [9] -> [9 * count, 1, 1, 1, 1]
        return each.repeat_interleave(count).view(-1, 1, 1, 1, 1)

    every_weight = weight[None, :, None].expand(x0.shape).reshape(-1)
    loss = nft_loss(
        spread(v), spread(v_old), v_target.reshape(-1, 1, 1, 1, 1), torch.full((x0.numel(), 1), t, dtype=torch.float64),
        every_weight, nft_beta=beta, v_ref=None, prior_weight=0.0, variant="plain", advantage_clip=5.0,
    )  # fmt: skip
    (slope,) = torch.autograd.grad((posterior.reshape(-1) * loss).sum(), v, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), v)
    rest = v.detach() - slope.detach() / curvature  # the loss is a parabola in each v: one Newton step is exact
    mean_weight = (posterior.sum(dim=2) * weight).sum(dim=1)
    reweighted = share * weight / (share * weight).sum()
    expected = v_old + 2 * mean_weight * (mixture_velocity(x_t, t, reweighted) - v_old) / beta
    assert (rest - expected).abs().max() < 1e-9
    assert (expected - v_old).abs().max() > 0.1


def posterior_samples(x_t: Tensor, t: float, share: Tensor) -> tuple[Tensor, Tensor]:
    """p(mode, x0 | x_t) as weighted points [9, 2, S]: closed-form Gaussians, three Gauss-Hermite nodes each."""
    variance = ((1 - t) * STD) ** 2 + t**2
    distance = x_t[:, None] - (1 - t) * MODES
    mode = (share.log() - distance**2 / (2 * variance)).softmax(dim=1)
    gain = (1 - t) * STD**2 / variance
    mean, std = MODES + gain * distance, STD * t / math.sqrt(variance)
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
    masses = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    return mode[:, :, None] * masses, mean[:, :, None] + std * nodes
