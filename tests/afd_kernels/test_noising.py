"""Forward process: definition, counter-based noise, argument errors."""

import math

import pytest
import torch

from afd_kernels import PhiloxNoise, add_noise_and_target, philox_normal

SHAPE = (2, 3, 5, 7, 3)  # N, C, F, H, W
# Random123's known answers for Philox4x32-10: (counter words, key words) -> words
KNOWN_ANSWER = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def draw():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))


def test_state_and_target_follow_their_definition():
    x0, eps = draw()
    t = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_t, v_target = add_noise_and_target(x0, eps, t)
    time = t[:, None, :, None, None]
    torch.testing.assert_close(x_t, (1 - time) * x0 + time * eps, rtol=1e-13, atol=1e-13)
    assert torch.equal(v_target, eps - x0)


def test_time_zero_is_clean_and_time_one_is_noise():
    x0, eps = draw()
    assert torch.equal(add_noise_and_target(x0, eps, torch.zeros(2))[0], x0)
    torch.testing.assert_close(add_noise_and_target(x0, eps, torch.ones(2))[0], eps, rtol=0, atol=1e-15)


def test_gradients_reach_both_inputs():
    x0, eps = (x[:, :1, :2, :2, :2].clone().requires_grad_() for x in draw())
    t = torch.rand(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: add_noise_and_target(a, b, t), (x0, eps))


def test_noise_matches_the_published_philox_words():
    words = [(word >> 9) + 0.5 for word in KNOWN_ANSWER]
    uniform = [word * 2.0**-23 for word in words]
    expected = []
    for u, angle in (uniform[:2], uniform[2:]):
        radius = math.sqrt(-2 * math.log(u))
        expected += [radius * math.cos(2 * math.pi * angle), radius * math.sin(2 * math.pi * angle)]
    torch.testing.assert_close(philox_normal(PhiloxNoise(0), (4,)), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_noise_is_standard_normal_and_streams_are_independent():
    count = 100_000
    noise = [philox_normal(PhiloxNoise(seed, offset), (count,)) for seed, offset in ((1, 0), (2, 0), (1, count))]
    bound = 5 / math.sqrt(count)
    for sample in noise:
        assert abs(sample.mean().item()) < bound
        assert abs(sample.square().mean().item() - 1) < 2 * bound
        assert abs(sample.pow(4).mean().item() - 3) < 10 * bound
    for other in noise[1:]:
        assert abs((noise[0] * other).mean().item()) < bound
    assert abs((noise[0][1:] * noise[0][:-1]).mean().item()) < bound


def test_noise_is_reproducible_and_continues_at_the_next_offset():
    whole = philox_normal(PhiloxNoise(5, 7), (16,))
    assert torch.equal(whole, philox_normal(PhiloxNoise(5, 7), (4, 4)).flatten())
    assert torch.equal(whole[8:], philox_normal(PhiloxNoise(5, 9), (8,)))


def test_named_noise_equals_given_noise():
    x0, _ = draw()
    noise, t = PhiloxNoise(3, 1), torch.rand(2)
    given = philox_normal(noise, SHAPE).double()
    for actual, expected in zip(add_noise_and_target(x0, noise, t), add_noise_and_target(x0, given, t), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["seed", "offset"])
def test_noise_names_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        PhiloxNoise(**{"seed": 0, name: -1})


def test_wrong_arguments_are_named():
    x0, eps = draw()
    with pytest.raises(ValueError, match=r"eps must have shape \[2, 3, 5, 7, 3\], got \[2, 3, 5, 7, 2\]"):
        add_noise_and_target(x0, eps[..., :2], torch.zeros(2))
    with pytest.raises(ValueError, match=r"eps must be torch.float64, got torch.float32"):
        add_noise_and_target(x0, eps.float(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must have shape \[2\], got \[3\]"):
        add_noise_and_target(x0, eps, torch.zeros(3))
    with pytest.raises(ValueError, match="t must not require a gradient"):
        add_noise_and_target(x0, eps, torch.zeros(2, requires_grad=True))
