"""Modulation and gated residual: the references against their definitions, argument errors."""

import pytest
import torch

from afd_kernels import adaln_modulate, gated_residual

BATCH, FRAMES, TOKENS, WIDTH = 2, 5, 7, 12


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(BATCH, FRAMES * TOKENS, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    first, second = (torch.randn(BATCH, FRAMES, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    return x, y, first, second


def test_modulation_normalises_then_scales_and_shifts_by_frame():
    x, _, shift, scale = draw()
    actual = adaln_modulate(x, shift, scale)
    for frame in range(FRAMES):
        rows = x[:, frame * TOKENS : (frame + 1) * TOKENS]
        normed = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        expected = normed * (1 + scale[:, frame, None]) + shift[:, frame, None]
        torch.testing.assert_close(actual[:, frame * TOKENS : (frame + 1) * TOKENS], expected, rtol=1e-12, atol=1e-12)


def test_gate_applies_by_frame():
    x, y, gate, _ = draw()
    expected = x + gate.repeat_interleave(TOKENS, dim=1) * y
    torch.testing.assert_close(gated_residual(x, y, gate), expected, rtol=1e-13, atol=1e-13)


def test_gradients_pass_gradcheck():
    x, y, first, second = draw()
    x, y = (z[:1, :4, :3].clone().requires_grad_() for z in (x, y))
    first, second = (z[:1, :2, :3].clone().requires_grad_() for z in (first, second))
    assert torch.autograd.gradcheck(adaln_modulate, (x, first, second))
    assert torch.autograd.gradcheck(gated_residual, (x, y, first))


def test_float32_modulation_of_bf16_activations_stays_bf16():
    x, y, shift, scale = draw(torch.float32)
    x, y = x.bfloat16(), y.bfloat16()
    out = gated_residual(x, adaln_modulate(y, shift, scale), shift)
    assert out.dtype == torch.bfloat16
    exact = gated_residual(x.double(), adaln_modulate(y.double(), shift.double(), scale.double()), shift.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_strided_inputs_give_the_same_result():
    x, _, shift, scale = draw()
    table = torch.stack([scale, shift], dim=2)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(adaln_modulate(strided, table[:, :, 1], table[:, :, 0]), adaln_modulate(x, shift, scale))


def test_wrong_arguments_are_named():
    x, y, shift, scale = draw()
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\], got \[35, 12\]"):
        adaln_modulate(x[0], shift, scale)
    with pytest.raises(ValueError, match="shift must have F dividing the 35 tokens, got F = 4"):
        adaln_modulate(x, shift[:, :4], scale[:, :4])
    with pytest.raises(ValueError, match=r"scale must have shape \[2, 5, 12\], got \[2, 1, 12\]"):
        adaln_modulate(x, shift, scale[:, :1])
    with pytest.raises(ValueError, match=r"scale must be torch\.float64, got torch.float32"):
        adaln_modulate(x, shift, scale.float())
    with pytest.raises(ValueError, match=r"y must have shape \[2, 35, 12\], got \[2, 34, 12\]"):
        gated_residual(x, y[:, 1:], shift)
    with pytest.raises(ValueError, match=r"gate must have shape \[2, 5, 12\], got \[2, 5, 11\]"):
        gated_residual(x, y, shift[..., 1:])
