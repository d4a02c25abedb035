"""Triton modulation and gated residual against the float64 oracle (run by ../test_lanes.py, interpreter and GPU)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from afd_kernels import adaln_modulate, gated_residual
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import check_against_oracle, patch_interpreter_bf16, poison_empty_tensors

DEVICE = "cpu" if is_interpreting() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, F, tokens per frame, D): tokens and D are multiples of nothing; a strip is 8 rows or more
SHAPES = [(1, 5, 7, 24), (2, 1, 19, 37), (1, 1, 3, 40)]

if is_interpreting():
    patch_interpreter_bf16()


@pytest.fixture(autouse=True)
def poison():
    restore = poison_empty_tensors()
    yield
    restore()


def draw(shape):
    generator = torch.Generator().manual_seed(0)
    batch, frames, tokens, width = shape
    x, y = (torch.randn(batch, frames * tokens, width, generator=generator) for _ in range(2))
    first, second = (torch.randn(batch, frames, width, generator=generator) for _ in range(2))
    return (3 * x + 1).requires_grad_(), y.requires_grad_(), first.requires_grad_(), second.requires_grad_()


def check_modulate(shape, dtype):
    x, _, shift, scale = draw(shape)
    return check_against_oracle(adaln_modulate, {"x": x, "shift": shift, "scale": scale}, dtype, device=DEVICE)


def check_gated(shape, dtype):
    x, y, gate, _ = draw(shape)
    return check_against_oracle(gated_residual, {"x": x, "y": y, "gate": gate}, dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("check", [check_modulate, check_gated])
def test_output_and_gradients_match_the_oracle(check, shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_narrow_rows_are_exact_to_the_rounding_of_their_terms(width):
    """At few columns nearly everything cancels (dx is 0 at D = 1), so results are no measure for errors: terms are."""
    x, _, shift, scale = (value.detach().to(DEVICE) for value in draw((2, 2, 9, width)))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(impl, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in (x, shift, scale)]
        out = adaln_modulate(*leaves, impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))

    # Largest terms, in float64: xhat is wrong by a few eps rho |x|, dx by that and a few eps times its own terms.
    wide, factor = x.double(), (1 + scale.double()).abs().repeat_interleave(9, dim=1)
    rho = (wide.var(-1, correction=0, keepdim=True) + 1e-6).rsqrt()
    g, spread = upstream.double().abs(), 1 + rho * wide.abs().amax(-1, keepdim=True)
    terms = (
        spread * factor + shift.double().abs().repeat_interleave(9, dim=1),
        rho * spread**2 * (g * factor).amax(-1, keepdim=True),
        g.unflatten(1, (2, 9)).sum(2),
        (g * spread).unflatten(1, (2, 9)).sum(2),
    )
    names = ("out", "dx", "dshift", "dscale")
    for name, got, want, size in zip(
        names, run("triton", torch.float32), run("reference", torch.float64), terms, strict=True
    ):
        error = ((got - want).abs() / size).max().item()
        assert error <= 4 * torch.finfo(torch.float32).eps, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 33), (3, 5, 35, 16), (2, 2, 9, 1536), (1, 7, 1, 130)], ids=str)
@pytest.mark.parametrize("check", [check_modulate, check_gated])
def test_every_shape_matches_the_oracle(check, shape, dtype):
    check(shape, dtype)


def test_float32_modulation_of_bf16_activations_as_slices_of_one_table():
    x, _, shift, scale = draw((2, 3, 5, 24))
    x = x.detach().to(DEVICE, torch.bfloat16)
    table = torch.stack([shift, scale, shift], dim=2).detach().to(DEVICE).requires_grad_()  # [B, F, 3, D]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    grads, outputs = [], []
    for impl in ("triton", "reference"):
        shift, scale, gate = table.unbind(2)
        out = gated_residual(x, adaln_modulate(x, shift, scale, impl=impl), gate, impl=impl)
        outputs.append(out)
        grads.append(torch.autograd.grad(out, table, upstream)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1.6e-2, atol=1e-2)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-1)
    assert grads[0].dtype == torch.float32


@pytest.mark.parametrize("wrapper", ["compile", "checkpoint", "checkpoint_reentrant"])
def test_gradients_survive_compile_and_activation_checkpointing(wrapper):
    x, y, shift, scale = (value.detach().to(DEVICE) for value in draw((1, 2, 3, 8)))

    def run(x, shift):
        return (
            gated_residual(y, adaln_modulate(x * 2, shift, scale, impl="triton"), shift, impl="triton").square().sum()
        )

    x.requires_grad_()
    shift.requires_grad_()
    expected = torch.autograd.grad(run(x, shift), (x, shift))
    if wrapper == "compile":
        backend = "aot_eager" if is_interpreting() else "inductor"
        total = torch.compile(run, backend=backend, fullgraph=True)(x, shift)
    else:
        total = checkpoint(run, x, shift, use_reentrant=wrapper == "checkpoint_reentrant")
    total.backward()
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(shift.grad, expected[1])
