"""The noising process, the samplers' grids and the times of the forward process."""

import math

import pytest
import torch

from afd.diffusion.flow_matching import add_noise, chunk_times, per_frame, sampler_grid, shift_time, x0_from_velocity


def test_self_forcing_grid_by_hand() -> None:
    grid = sampler_grid([1000, 750, 500, 250], shift=5)
    assert grid == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8), abs=1e-12)


def test_shift_one_is_the_identity_and_shifts_compose() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 1.0), t, rtol=0, atol=1e-15)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 5.0), shift_time(t, 15.0), rtol=0, atol=1e-15)
    warped = shift_time(t, 5.0)
    assert (warped[0], warped[-1]) == (0, 1)
    assert (warped.diff() > 0).all()


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_must_be_positive(shift: float) -> None:
    with pytest.raises(ValueError, match=f"shift must be > 0, got {shift}"):
        shift_time(torch.ones(1), shift)


@pytest.mark.parametrize("steps", [[], [500, 500], [250, 500], [1001], [500, 0], [500, -1]])
def test_steps_must_decrease_within_the_range(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="steps must be strictly decreasing integers in"):
        sampler_grid(steps, shift=5)


def test_noising_interpolates_frame_by_frame_and_the_velocity_leads_back() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 5, 7, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    t[0, 0], t[0, 1] = 0, 1
    x_t = add_noise(x0, eps, t)
    assert torch.equal(x_t[0, :, 0], x0[0, :, 0])
    assert torch.equal(x_t[0, :, 1], eps[0, :, 1])
    assert x_t[1, 2, 3, 4, 0].item() == pytest.approx(
        (1 - t[1, 3].item()) * x0[1, 2, 3, 4, 0].item() + t[1, 3].item() * eps[1, 2, 3, 4, 0].item()
    )
    torch.testing.assert_close(x0_from_velocity(x_t, eps - x0, t), x0, rtol=0, atol=1e-14)


def test_times_take_the_latents_shape_and_dtype() -> None:
    times = per_frame(torch.rand(2, 5, dtype=torch.float64), torch.zeros(2, 3, 5, 7, 1))
    assert times.shape == (2, 1, 5, 1, 1)
    assert times.dtype == torch.float32


def test_grid_times_are_the_samplers_own_and_equally_likely() -> None:
    grid = (1.0, 0.75, 0.5)
    uniforms = torch.tensor([[0.0, 0.34, 0.999999999], [0.33, 0.67, 0.5]])
    t = chunk_times(uniforms, chunk_lengths=(2, 2, 2), sampling="grid", grid=grid, shift=3.0)
    assert t.dtype == torch.float32
    assert t.tolist() == [[1, 1, 0.75, 0.75, 0.5, 0.5], [1, 1, 0.5, 0.5, 0.75, 0.75]]
    many = torch.rand(3000, 1, generator=torch.Generator().manual_seed(0))
    drawn = chunk_times(many, chunk_lengths=(1,), sampling="grid", grid=grid, shift=3.0)
    for time in grid:
        assert (drawn == time).float().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_the_first_chunk_may_have_its_own_length_and_times() -> None:
    uniforms = torch.tensor([[0.9, 0.9, 0.1]])
    t = chunk_times(
        uniforms, chunk_lengths=(1, 2, 2), sampling="grid", grid=(1.0, 0.5), shift=3.0, first_grid=(1.0, 0.7, 0.25)
    )
    assert t.tolist() == [[0.25, 0.5, 0.5, 1.0, 1.0]]


def test_terminal_times_are_the_last_of_each_grid() -> None:
    uniforms = torch.rand(4, 3)
    t = chunk_times(
        uniforms, chunk_lengths=(1, 2, 2), sampling="terminal", grid=(1.0, 0.5), shift=3.0, first_grid=(1.0, 0.25)
    )
    assert t.tolist() == [[0.25, 0.5, 0.5, 0.5, 0.5]] * 4


def test_uniform_times_are_warped() -> None:
    uniforms = torch.tensor([[0.0, 0.5]])
    t = chunk_times(uniforms, chunk_lengths=(3, 3), sampling="uniform", grid=(), shift=3.0)
    assert t.tolist() == [[0, 0, 0, 0.75, 0.75, 0.75]]


def test_logit_normal_times_have_the_right_quantiles_and_stay_inside() -> None:
    one_sigma = 0.8413447460685429
    uniforms = torch.tensor([[0.0, 1 - one_sigma, 0.5, one_sigma, 1.0]], dtype=torch.float64)
    (t,) = chunk_times(uniforms, chunk_lengths=(1,) * 5, sampling="logit_normal", grid=(), shift=1.0)
    sigmoid = 1 / (1 + math.exp(-1))
    assert t[1:4].tolist() == pytest.approx([1 - sigmoid, 0.5, sigmoid], abs=1e-6)
    assert 0 < t[0] < 0.01
    assert 0.99 < t[4] < 1


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 2, 1)])
def test_one_uniform_per_chunk_is_needed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"uniforms must be \[N, 2\] for chunks of \[3, 3\] frames, got"):
        chunk_times(torch.rand(shape), chunk_lengths=(3, 3), sampling="uniform", grid=(), shift=1.0)


def test_unknown_time_sampling_is_named() -> None:
    with pytest.raises(ValueError, match="must be grid, terminal, uniform or logit_normal, got 'cosine'"):
        chunk_times(
            torch.rand(1, 1),
            chunk_lengths=(1,),
            sampling="cosine",  # pyright: ignore[reportArgumentType]
            grid=(),
            shift=1.0,
        )
