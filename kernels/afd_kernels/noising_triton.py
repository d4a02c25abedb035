"""Triton forward process: x_t and v* in one pass, the noise read or drawn in registers.

Rows as in `nft_loss_triton`: C * F rows of H * W elements per sample, one time per row.
"""

# Triton ships no types for kernel launches and for the language inside kernels.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from afd_kernels.launching import ceil_div, device_guard, element_tile
from afd_kernels.noising_reference import PhiloxNoise

GIVEN, QUADS, SINGLES = 0, 1, 2  # noise: read; four elements per counter; one element per thread (rows not % 4)
_QUADS, _SINGLES = tl.constexpr(QUADS), tl.constexpr(SINGLES)


@triton.jit
def _cosine_and_sine(turns):
    """cos and sin of 2 pi turns, turns in [0, 1], to float32 rounding: Taylor series in the nearest quarter turn.

    (The device's own take a path through local memory for huge angles, which never occur here.)
    """
    quarter = tl.floor(4.0 * turns + 0.5)
    angle = (turns - 0.25 * quarter) * 6.283185307179586  # [-pi/4, pi/4]
    square = angle * angle
    sine = 8.333333333e-03 + square * (-1.984126984e-04 + square * 2.755731922e-06)
    sine = angle + angle * square * (-1.666666667e-01 + square * sine)
    cosine = -1.388888889e-03 + square * (2.480158730e-05 - square * 2.755731922e-07)
    cosine = 1.0 + square * (-0.5 + square * (4.166666667e-02 + square * cosine))
    index = quarter.to(tl.int32) & 3
    is_odd = (index & 1) == 1
    turned_cosine = tl.where(is_odd, sine, cosine)
    turned_sine = tl.where(is_odd, cosine, sine)
    turned_cosine = tl.where((index == 1) | (index == 2), -turned_cosine, turned_cosine)
    return turned_cosine, tl.where(index >= 2, -turned_sine, turned_sine)


@triton.jit
def _pair_of_normals(first, second):
    """Two standard normals from two random words: Box-Muller on the centres of 2^23 cells."""
    uniform = ((first >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    cosine, sine = _cosine_and_sine(((second >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07)
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    return radius * cosine, radius * sine


@triton.jit
def add_noise_and_target_kernel(
    x0_ptr,
    eps_ptr,
    times_ptr,
    x_t_ptr,
    target_ptr,
    num_rows,
    num_frames,
    row_size,
    seed,
    counter_offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """x_t = x0 + t v* and v* = eps - x0 for ROWS rows x COLUMNS elements of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    time = tl.load(times_ptr + sample * num_frames + row % num_frames, mask=row_mask, other=0.0)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = row_mask[:, None] & (column < row_size)
    start = sample * num_rows * row_size + row[:, None].to(tl.int64) * row_size
    offset = start + column
    x0 = tl.load(x0_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if NOISE == _QUADS:
        quad = tl.program_id(2) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
        word_0, word_1, word_2, word_3 = tl.randint4x(seed, counter_offset + start // 4 + quad)
        normal_0, normal_1 = _pair_of_normals(word_0, word_1)
        normal_2, normal_3 = _pair_of_normals(word_2, word_3)
        eps = tl.interleave(tl.interleave(normal_0, normal_2), tl.interleave(normal_1, normal_3))
    elif NOISE == _SINGLES:
        word_0, word_1, word_2, word_3 = tl.randint4x(seed, counter_offset + offset // 4)
        is_upper = offset % 4 >= 2
        cosine, sine = _pair_of_normals(tl.where(is_upper, word_2, word_0), tl.where(is_upper, word_3, word_1))
        eps = tl.where(offset % 2 == 0, cosine, sine)
    else:
        eps = tl.load(eps_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    target = eps - x0
    tl.store(x_t_ptr + offset, (x0 + time * target).to(x_t_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + offset, target.to(target_ptr.dtype.element_ty), mask=mask)


@custom_op("afd_kernels::add_noise_and_target", mutates_args=())
def add_noise_and_target_op(
    x0: Tensor, eps: Tensor | None, times: Tensor, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    """x_t and v_target; x0, eps contiguous [N, C, F, H, W], times float32 [N, F]; eps None: Philox(seed, offset)."""
    num_samples, channels, frames, height, width = x0.shape
    num_rows, row_size = channels * frames, height * width
    rows, columns = element_tile(num_rows, row_size)
    noise = GIVEN if eps is not None else QUADS if row_size % 4 == 0 else SINGLES
    x_t = torch.empty(x0.shape, device=x0.device, dtype=x0.dtype)
    target = torch.empty(x0.shape, device=x0.device, dtype=x0.dtype)
    with device_guard(x0):
        add_noise_and_target_kernel[(num_samples, ceil_div(num_rows, rows), ceil_div(row_size, columns))](
            x0, eps, times, x_t, target, num_rows, frames, row_size, seed, offset,
            ROWS=rows, COLUMNS=columns, NOISE=noise, num_warps=4,
        )  # fmt: skip
    return x_t, target


@add_noise_and_target_op.register_fake
def _(x0, eps, times, seed, offset):
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape)


def _setup_context(ctx, inputs, output):
    _, eps, times, _, _ = inputs
    ctx.save_for_backward(times)
    ctx.has_eps = eps is not None


def _backward(ctx, grad_x_t, grad_target):
    # The update never differentiates the noising; objectives that do (a GAN on noised states) pay one eager pass.
    (times,) = ctx.saved_tensors
    time = times[:, None, :, None, None]
    grad_x0 = ((1 - time) * grad_x_t - grad_target).to(grad_x_t.dtype)
    grad_eps = (time * grad_x_t + grad_target).to(grad_x_t.dtype) if ctx.has_eps else None
    return grad_x0, grad_eps, None, None, None


add_noise_and_target_op.register_autograd(_backward, setup_context=_setup_context)


def add_noise_and_target_triton(x0: Tensor, eps: Tensor | PhiloxNoise, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_t, v_target); arguments as checked by `add_noise_and_target`, times [N, F]."""
    times = times.to(torch.float32).contiguous()
    if isinstance(eps, PhiloxNoise):
        return add_noise_and_target_op(x0.contiguous(), None, times, eps.seed, eps.offset)
    return add_noise_and_target_op(x0.contiguous(), eps.contiguous(), times, 0, 0)
