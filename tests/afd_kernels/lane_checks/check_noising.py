"""Triton forward process against the float64 oracle (run by ../test_lanes.py in the interpreter and on a GPU)."""

import pytest
import torch

from afd_kernels import PhiloxNoise, add_noise_and_target, philox_normal
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import check_against_oracle, patch_interpreter_bf16, poison_empty_tensors

DEVICE = "cpu" if is_interpreting() else "cuda"
SHAPE = (3, 2, 5, 7, 3)  # N, C, F, H, W
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Device log, cos and sin are approximate; the interpreter's are numpy's.
NOISE_TOLERANCE = 2e-6 if is_interpreting() else 1e-4

if is_interpreting():
    patch_interpreter_bf16()


@pytest.fixture(autouse=True)
def poison():
    restore = poison_empty_tensors()
    yield
    restore()


def draw(shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(shape, generator=generator, requires_grad=True)
    eps = torch.randn(shape, generator=generator, requires_grad=True)
    times = torch.rand(shape[0], shape[2], generator=generator).to(DEVICE)
    times[:, 0] = 0.0
    times[:, -1] = 1.0
    return x0, eps, times


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_per_frame", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 2, 33, 34)], ids=str)
def test_state_target_and_gradients_match_the_oracle(shape, is_per_frame, dtype):
    x0, eps, times = draw(shape)
    t = times if is_per_frame else times[:, 0] + 0.25

    def call(x0, eps, impl):
        return add_noise_and_target(x0, eps, t, impl=impl)

    check_against_oracle(call, {"x0": x0, "eps": eps}, dtype, device=DEVICE)


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 5, 4, 4), (2, 1, 1, 2, 2), (1, 1, 1, 34, 34)], ids=str)
@pytest.mark.parametrize("noise", [PhiloxNoise(7), PhiloxNoise(2**40 + 17, 2**32 - 3)], ids=str)
def test_kernel_noise_is_the_named_noise(shape, noise):
    x0 = torch.zeros(shape, device=DEVICE)
    x_t, target = add_noise_and_target(x0, noise, torch.ones(shape[0], device=DEVICE), impl="triton")
    expected = philox_normal(noise, shape, device=DEVICE)
    torch.testing.assert_close(x_t, expected, rtol=NOISE_TOLERANCE, atol=NOISE_TOLERANCE)
    torch.testing.assert_close(target, x_t, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_noise_equals_given_noise(dtype):
    x0, _, times = draw((2, 3, 5, 4, 4))
    x0 = x0.detach().to(DEVICE, dtype)
    noise = PhiloxNoise(3, 5)
    actual = add_noise_and_target(x0, noise, times[:2], impl="triton")
    expected = add_noise_and_target(x0, noise, times[:2], impl="reference")
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=max(tolerance, NOISE_TOLERANCE))


def test_next_offset_continues_the_stream():
    x0 = torch.zeros(1, 1, 2, 4, 4, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    both = add_noise_and_target(
        torch.zeros(2, 1, 2, 4, 4, device=DEVICE), PhiloxNoise(3, 11), one.expand(2), impl="triton"
    )
    first = add_noise_and_target(x0, PhiloxNoise(3, 11), one, impl="triton")
    second = add_noise_and_target(x0, PhiloxNoise(3, 11 + 8), one, impl="triton")
    assert torch.equal(both[0], torch.cat([first[0], second[0]]))


def test_operator_compiles_in_one_graph():
    x0, eps, times = draw()
    x0, eps = x0.detach().to(DEVICE), eps.detach().to(DEVICE)
    backend = "aot_eager" if is_interpreting() else "inductor"

    def run(x0, eps):
        return add_noise_and_target(x0, eps, times, impl="triton")

    for got, wanted in zip(torch.compile(run, backend=backend, fullgraph=True)(x0, eps), run(x0, eps), strict=True):
        assert torch.equal(got, wanted)
