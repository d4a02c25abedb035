"""Triton NFT loss: one pass forward (five sums per sample), one pass backward (three scalars per sample).

A sample is C * F contiguous rows of H * W elements; a row has one time. Forward programs write partial sums, a small
second kernel turns them into the loss and the scalars of the backward pass. Derivation: kernels/README.md.
"""

# Triton ships no types for kernel launches and for the language inside kernels.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from afd_kernels.launching import ceil_div, device_guard, element_tile, next_power_of_2
from afd_kernels.nft_loss_reference import ABS_FLOOR, NFTLossConstants

FLOOR = tl.constexpr(ABS_FLOOR)


@triton.jit
def _row_times(times_ptr, sample, row, num_frames, row_mask, IS_ADAPTIVE: tl.constexpr):
    """Time of each row [ROWS]; 1 in the plain variant."""
    if IS_ADAPTIVE:
        return tl.load(times_ptr + sample * num_frames + row % num_frames, mask=row_mask, other=0.0)
    return row_mask.to(tl.float32)


@triton.jit
def _load_branches(
    v_ptr, old_ptr, target_ptr, noise_ptr, offset, mask, nft_beta, HAS_OLD: tl.constexpr, HAS_NOISE: tl.constexpr
):
    """v, A = v_old - v* and G = beta (v - v_old), float32: v+ - v* = A + G, v- - v* = A - G."""
    v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_NOISE:
        target = tl.load(noise_ptr + offset, mask=mask, other=0.0).to(tl.float32) - target
    if HAS_OLD:
        old = tl.load(old_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        return v, old - target, nft_beta * (v - old)
    return v, v - target, tl.zeros_like(v)


@triton.jit
def nft_loss_sums_kernel(
    v_ptr,
    old_ptr,
    target_ptr,
    noise_ptr,
    ref_ptr,
    times_ptr,
    partial_ptr,
    num_rows,
    num_frames,
    row_size,
    nft_beta,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_REF: tl.constexpr,
    IS_ADAPTIVE: tl.constexpr,
):
    """Partial sums of (t d+)^2, |t d+|, (t d-)^2, |t d-|, (v - v_ref)^2 over ROWS rows of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    time = _row_times(times_ptr, sample, row, num_frames, row_mask, IS_ADAPTIVE)[:, None]
    start = sample * num_rows * row_size + row[:, None].to(tl.int64) * row_size
    positive_square = tl.zeros([ROWS, COLUMNS], tl.float32)
    positive_abs = tl.zeros([ROWS, COLUMNS], tl.float32)
    negative_square = tl.zeros([ROWS, COLUMNS], tl.float32)
    negative_abs = tl.zeros([ROWS, COLUMNS], tl.float32)
    prior = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, row_size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = row_mask[:, None] & (column < row_size)
        offset = start + column
        v, error, step = _load_branches(
            v_ptr, old_ptr, target_ptr, noise_ptr, offset, mask, nft_beta, HAS_OLD, HAS_NOISE
        )
        positive = time * (error + step)
        positive_square += positive * positive
        positive_abs += tl.abs(positive)
        if HAS_OLD:
            negative = time * (error - step)
            negative_square += negative * negative
            negative_abs += tl.abs(negative)
        if HAS_REF:
            deviation = v - tl.load(ref_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            prior += deviation * deviation
    out = partial_ptr + (sample * tl.num_programs(1) + block) * 5
    tl.store(out, tl.sum(tl.sum(positive_square, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(positive_abs, 1), 0))
    if HAS_OLD:
        tl.store(out + 2, tl.sum(tl.sum(negative_square, 1), 0))
        tl.store(out + 3, tl.sum(tl.sum(negative_abs, 1), 0))
    if HAS_REF:
        tl.store(out + 4, tl.sum(tl.sum(prior, 1), 0))


@triton.jit
def _column_sum(partial_ptr, index, num_partials, BLOCK: tl.constexpr):
    """Sum of one of the five columns of a sample's partial sums."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_partials, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + row * 5 + index, mask=row < num_partials, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def nft_loss_finish_kernel(
    partial_ptr,
    w_ptr,
    loss_ptr,
    scalars_ptr,
    num_partials,
    numel,
    nft_beta,
    prior_weight,
    advantage_clip,
    BLOCK: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    IS_ADAPTIVE: tl.constexpr,
    IS_PRIOR_WEIGHTED: tl.constexpr,
):
    """Loss of one sample and its backward scalars: dL/dv = t^2 (a A + b G) + r (v - v_ref)."""
    sample = tl.program_id(0).to(tl.int64)
    partial_ptr += sample * num_partials * 5
    w = tl.load(w_ptr + sample)
    positive_square = _column_sum(partial_ptr, 0, num_partials, BLOCK) / numel
    positive_abs = _column_sum(partial_ptr, 1, num_partials, BLOCK) / numel
    negative_square, negative_abs = positive_square, positive_abs
    if HAS_OLD:
        negative_square = _column_sum(partial_ptr, 2, num_partials, BLOCK) / numel
        negative_abs = _column_sum(partial_ptr, 3, num_partials, BLOCK) / numel
    positive_weight, negative_weight = w, 1.0 - w
    if IS_ADAPTIVE:
        factor = advantage_clip / nft_beta
        positive_weight = positive_weight * factor / tl.maximum(positive_abs, FLOOR)
        negative_weight = negative_weight * factor / tl.maximum(negative_abs, FLOOR)
    loss = positive_weight * positive_square + negative_weight * negative_square
    prior_scalar = 0.0
    if HAS_REF:
        prior_scalar = prior_weight
        if IS_PRIOR_WEIGHTED:
            prior_scalar = prior_weight * w
        loss += prior_scalar * (_column_sum(partial_ptr, 4, num_partials, BLOCK) / numel)
    tl.store(loss_ptr + sample, loss)
    tl.store(scalars_ptr + sample * 3, 2.0 * nft_beta * (positive_weight - negative_weight) / numel)
    tl.store(scalars_ptr + sample * 3 + 1, 2.0 * nft_beta * (positive_weight + negative_weight) / numel)
    tl.store(scalars_ptr + sample * 3 + 2, 2.0 * prior_scalar / numel)


@triton.jit
def nft_loss_backward_kernel(
    v_ptr,
    old_ptr,
    target_ptr,
    noise_ptr,
    ref_ptr,
    times_ptr,
    scalars_ptr,
    grad_loss_ptr,
    grad_v_ptr,
    num_rows,
    num_frames,
    row_size,
    nft_beta,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_REF: tl.constexpr,
    IS_ADAPTIVE: tl.constexpr,
):
    """Gradient of v for ROWS rows of one sample, element by element."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    time = _row_times(times_ptr, sample, row, num_frames, row_mask, IS_ADAPTIVE)
    grad_loss = tl.load(grad_loss_ptr + sample)
    error_scalar = (grad_loss * tl.load(scalars_ptr + sample * 3) * time * time)[:, None]
    step_scalar = (grad_loss * tl.load(scalars_ptr + sample * 3 + 1) * time * time)[:, None]
    prior_scalar = grad_loss * tl.load(scalars_ptr + sample * 3 + 2)
    start = sample * num_rows * row_size + row[:, None].to(tl.int64) * row_size
    for first in range(0, row_size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = row_mask[:, None] & (column < row_size)
        offset = start + column
        v, error, step = _load_branches(
            v_ptr, old_ptr, target_ptr, noise_ptr, offset, mask, nft_beta, HAS_OLD, HAS_NOISE
        )
        grad = error_scalar * error
        if HAS_OLD:
            grad += step_scalar * step
        if HAS_REF:
            grad += prior_scalar * (v - tl.load(ref_ptr + offset, mask=mask, other=0.0).to(tl.float32))
        tl.store(grad_v_ptr + offset, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


@custom_op("afd_kernels::nft_loss_forward", mutates_args=())
def nft_loss_forward(
    v: Tensor,
    v_old: Tensor | None,
    target: Tensor,
    noise: Tensor | None,
    times: Tensor,
    w: Tensor,
    v_ref: Tensor | None,
    constants: list[float],
    is_adaptive: bool,
    is_prior_weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [N] and backward scalars [N, 3], float32; tensors contiguous, constants (beta, prior_weight, clip)."""
    num_samples, channels, frames, height, width = v.shape
    num_rows, row_size = channels * frames, height * width
    rows, columns = element_tile(num_rows, row_size)
    num_partials = ceil_div(num_rows, rows)
    partial = torch.empty((num_samples, num_partials, 5), device=v.device, dtype=torch.float32)
    loss = torch.empty((num_samples,), device=v.device, dtype=torch.float32)
    scalars = torch.empty((num_samples, 3), device=v.device, dtype=torch.float32)
    nft_beta, prior_weight, advantage_clip = constants
    with device_guard(v):
        nft_loss_sums_kernel[(num_samples, num_partials)](
            v, v_old, target, noise, v_ref, times, partial, num_rows, frames, row_size, nft_beta,
            ROWS=rows, COLUMNS=columns, HAS_OLD=v_old is not None, HAS_NOISE=noise is not None,
            HAS_REF=v_ref is not None, IS_ADAPTIVE=is_adaptive, num_warps=4,
        )  # fmt: skip
        nft_loss_finish_kernel[(num_samples,)](
            partial, w, loss, scalars, num_partials, float(num_rows * row_size), nft_beta, prior_weight,
            advantage_clip, BLOCK=min(512, next_power_of_2(num_partials)), HAS_OLD=v_old is not None,
            HAS_REF=v_ref is not None, IS_ADAPTIVE=is_adaptive, IS_PRIOR_WEIGHTED=is_prior_weighted, num_warps=4,
        )  # fmt: skip
    return loss, scalars


@nft_loss_forward.register_fake
def _(v, v_old, target, noise, times, w, v_ref, constants, is_adaptive, is_prior_weighted):
    num_samples = v.shape[0]
    return v.new_empty((num_samples,), dtype=torch.float32), v.new_empty((num_samples, 3), dtype=torch.float32)


@custom_op("afd_kernels::nft_loss_backward", mutates_args=())
def nft_loss_backward(
    grad_loss: Tensor,
    v: Tensor,
    v_old: Tensor | None,
    target: Tensor,
    noise: Tensor | None,
    times: Tensor,
    v_ref: Tensor | None,
    scalars: Tensor,
    nft_beta: float,
    is_adaptive: bool,
) -> Tensor:
    """Gradient of v, v's shape and dtype."""
    num_samples, channels, frames, height, width = v.shape
    num_rows, row_size = channels * frames, height * width
    rows, columns = element_tile(num_rows, row_size)
    grad_v = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    with device_guard(v):
        nft_loss_backward_kernel[(num_samples, ceil_div(num_rows, rows))](
            v, v_old, target, noise, v_ref, times, scalars, grad_loss.contiguous(), grad_v, num_rows, frames, row_size,
            nft_beta, ROWS=rows, COLUMNS=columns, HAS_OLD=v_old is not None, HAS_NOISE=noise is not None,
            HAS_REF=v_ref is not None, IS_ADAPTIVE=is_adaptive, num_warps=4,
        )  # fmt: skip
    return grad_v


@nft_loss_backward.register_fake
def _(grad_loss, v, v_old, target, noise, times, v_ref, scalars, nft_beta, is_adaptive):
    return v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    v, v_old, target, noise, times, _, v_ref, constants, is_adaptive, _ = inputs
    ctx.save_for_backward(v, v_old, target, noise, times, v_ref, output[1])
    ctx.nft_beta, ctx.is_adaptive = constants[0], is_adaptive


def _backward(ctx, grad_loss, grad_scalars):
    grad_v = nft_loss_backward(grad_loss, *ctx.saved_tensors, ctx.nft_beta, ctx.is_adaptive)
    return grad_v, None, None, None, None, None, None, None, None, None


nft_loss_forward.register_autograd(_backward, setup_context=_setup_context)


def nft_loss_triton(
    v: Tensor,
    v_old: Tensor | None,
    targets: tuple[Tensor, ...],
    times: Tensor,
    w: Tensor,
    v_ref: Tensor | None,
    constants: NFTLossConstants,
) -> Tensor:
    """Per-sample loss [N]; arguments as checked by `nft_loss` (targets: (v_target,) or (x0, eps); times [N, F])."""
    loss, _ = nft_loss_forward(
        v.contiguous(),
        None if v_old is None else v_old.contiguous(),
        targets[0].contiguous(),
        targets[1].contiguous() if len(targets) == 2 else None,
        times.to(torch.float32).contiguous(),
        w.to(torch.float32).contiguous(),
        None if v_ref is None else v_ref.contiguous(),
        [constants.nft_beta, constants.prior_weight, constants.advantage_clip],
        constants.is_adaptive,
        constants.is_prior_weighted,
    )
    return loss
