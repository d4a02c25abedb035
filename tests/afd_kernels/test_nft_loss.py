"""NFT loss: the reference against the paper's own formulas, and argument errors of the public function."""

import pytest
import torch

from afd_kernels import nft_loss

SHAPE = (3, 2, 5, 7, 3)  # N, C, F, H, W


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    names = ("v", "v_old", "x0", "eps", "v_ref")
    return {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in names}


@pytest.fixture
def times():
    return torch.rand(SHAPE[0], SHAPE[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def w():
    return torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def per_frame(t):
    return t[:, None, :, None, None]


def test_adaptive_variant_is_the_published_x0_space_loss(tensors, times, w):
    beta, clip, weight = 0.3, 5.0, 0.02
    x0, eps, t = tensors["x0"], tensors["eps"], per_frame(times)
    x_t = (1 - t) * x0 + t * eps
    branches = []
    for sign in (1, -1):
        v = (1 - sign * beta) * tensors["v_old"] + sign * beta * tensors["v"]
        error = x_t - t * v - x0
        scale = error.abs().flatten(1).mean(1).clip(min=1e-5)
        branches.append((error.square().flatten(1) / scale[:, None]).mean(1))
    prior = (tensors["v"] - tensors["v_ref"]).square().flatten(1).mean(1)
    expected = clip * (w * branches[0] / beta + (1 - w) * branches[1] / beta) + weight * prior
    actual = nft_loss(
        tensors["v"], tensors["v_old"], (x0, eps), times, w, nft_beta=beta, v_ref=tensors["v_ref"],
        prior_weight=weight, is_prior_weighted=False,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_plain_variant_is_the_weighted_square_error(tensors, times, w):
    beta, target = 0.3, tensors["eps"] - tensors["x0"]
    positive = (1 - beta) * tensors["v_old"] + beta * tensors["v"]
    negative = (1 + beta) * tensors["v_old"] - beta * tensors["v"]
    means = [(v - target).square().flatten(1).mean(1) for v in (positive, negative)]
    prior = w * (tensors["v"] - tensors["v_ref"]).square().flatten(1).mean(1)
    actual = nft_loss(
        tensors["v"], tensors["v_old"], target, times, w, nft_beta=beta, v_ref=tensors["v_ref"], prior_weight=0.5,
        variant="plain",
    )  # fmt: skip
    torch.testing.assert_close(actual, w * means[0] + (1 - w) * means[1] + 0.5 * prior, rtol=1e-12, atol=0)


@pytest.mark.parametrize("is_current", [True, False])
def test_gradient_at_the_old_policy_is_signed_regression(tensors, times, w, is_current):
    beta, v, target = 0.3, tensors["v"].requires_grad_(), tensors["eps"]
    old = None if is_current else v.detach().clone()
    loss = nft_loss(v, old, target, times, w, nft_beta=beta, variant="plain")
    (grad,) = torch.autograd.grad(loss.mean(), v)
    expected = 2 * beta * (2 * w - 1)[:, None, None, None, None] * (v.detach() - target) / v.numel()
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, nft_loss(v, old, target, times, 1 - w, nft_beta=beta, variant="plain"))


@pytest.mark.parametrize("clip", [5.0, 2.0])
def test_plain_loss_is_least_where_advantage_clip_and_beta_say(tensors, times, clip):
    """v_old + (2 w - 1) / beta (v* - v_old), with 2 w - 1 = advantage / clip: how far an update may go."""
    advantage, beta = torch.tensor([-1.5, 0.0, 1.0], dtype=torch.float64), 0.5
    w, share = advantage / (2 * clip) + 0.5, advantage / clip / beta
    old, target = tensors["v_old"], tensors["eps"]
    best = (old + share[:, None, None, None, None] * (target - old)).requires_grad_()
    loss = nft_loss(best, old, target, times, w, nft_beta=beta, variant="plain")
    (grad,) = torch.autograd.grad(loss.sum(), best)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_time_per_sample_equals_the_same_time_on_every_frame(tensors, times, w):
    arguments = (tensors["v"], tensors["v_old"], tensors["eps"])
    per_sample = nft_loss(*arguments, times[:, 0], w, nft_beta=0.3)
    torch.testing.assert_close(per_sample, nft_loss(*arguments, times[:, :1].expand(3, 5), w, nft_beta=0.3))


def test_zero_time_gives_zero_loss_and_finite_gradient(tensors, w):
    v = tensors["v"].requires_grad_()
    loss = nft_loss(v, tensors["v_old"], tensors["eps"], torch.zeros(3), w, nft_beta=0.3)
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", ["v_old", "x0", "eps", "v_ref", "t", "w"])
def test_gradient_of_any_other_input_is_refused(tensors, times, w, name):
    named = {**tensors, "t": times, "w": w}
    named[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        nft_loss(
            named["v"], named["v_old"], (named["x0"], named["eps"]), named["t"], named["w"], nft_beta=0.3,
            v_ref=named["v_ref"], prior_weight=0.1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 5, 7, 3)}, r"v must be \[N, C, F, H, W\], got \[2, 5, 7, 3\]"),
        ({"v_old": torch.zeros(3, 2, 5, 7, 4)}, r"v_old must have shape \[3, 2, 5, 7, 3\], got \[3, 2, 5, 7, 4\]"),
        ({"v_old": torch.zeros(SHAPE)}, "v_old must be torch.float64, got torch.float32"),
        ({"v_target": (torch.zeros(SHAPE),)}, r"v_target must be a tensor or the pair \(x0, eps\), got 1"),
        ({"t": torch.zeros(3, 4)}, r"t must have shape \[3, 5\], got \[3, 4\]"),
        (
            {"t": torch.zeros(3, 5, dtype=torch.int64)},
            "t must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"w": torch.zeros(2)}, r"w must have shape \[3\], got \[2\]"),
        ({"w": 0.5}, r"w must be a tensor \[N\], got float"),
        ({"v": torch.zeros(3, 2, 0, 7, 3)}, r"v must be .* with every size > 0, got \[3, 2, 0, 7, 3\]"),
        ({"nft_beta": 0.0}, "nft_beta must be > 0, got 0.0"),
        ({"prior_weight": -1.0}, "prior_weight must be >= 0, got -1.0"),
        ({"prior_weight": 0.1}, "v_ref must be given when prior_weight > 0"),
        ({"variant": "other"}, "variant must be one of plain, adaptive, got 'other'"),
        ({"impl": "cuda"}, "nft_loss: impl must be one of reference, triton or None, got 'cuda'"),
        ({"w": torch.zeros(3, device="meta")}, "w must be on cpu, got meta"),
    ],
)
def test_wrong_arguments_are_named(tensors, times, w, change, message):
    arguments = {"v": tensors["v"], "v_old": tensors["v_old"], "v_target": tensors["eps"], "t": times, "w": w}
    with pytest.raises(ValueError, match=message):
        nft_loss(**{**arguments, "nft_beta": 0.3, **change})
