"""Triton LayerNorm modulation and gated residual, forward and backward.

A program owns a strip of rows of one (batch, frame) pair, so the frame's shift, scale or gate row is read once and
stays in registers; backward, the strip's sums for dshift, dscale, dgate go out as one partial row. Derivation:
kernels/README.md.
"""

# Triton ships no types for kernel launches and for the language inside kernels.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from afd_kernels.launching import ceil_div, device_guard, next_power_of_2, row_warps, rows_per_program

FORWARD_ROWS = 16  # rows per program forward: one read of the modulation for 16 rows


@triton.jit
def _standardise(x_ptr, start, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row (x - mean) / std in float32 (zeros beyond WIDTH) and 1 / std."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, 0) / WIDTH, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / WIDTH + eps)
    return centred * scale, scale


@triton.jit
def _load_frame_row(ptr, frame, num_frames, stride_batch, stride_frame, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Row of (batch, frame) number `frame` of a modulation [B, F, D], float32."""
    column = tl.arange(0, BLOCK)
    # Divided as 32-bit: a 64-bit division is a subroutine.
    start = (frame // num_frames).to(tl.int64) * stride_batch + (frame % num_frames) * stride_frame
    return tl.load(ptr + start + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def adaln_modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    num_frames,
    tokens,
    rows_per_program,
    shift_stride_batch,
    shift_stride_frame,
    scale_stride_batch,
    scale_stride_frame,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise and modulate a strip of rows of one frame."""
    frame = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    shift = _load_frame_row(shift_ptr, frame, num_frames, shift_stride_batch, shift_stride_frame, WIDTH, BLOCK)
    scale = _load_frame_row(scale_ptr, frame, num_frames, scale_stride_batch, scale_stride_frame, WIDTH, BLOCK)
    first = tl.program_id(1) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, tokens)):
        start = (frame.to(tl.int64) * tokens + row) * WIDTH
        normed, _ = _standardise(x_ptr, start, eps, WIDTH, BLOCK)
        out = normed * (1.0 + scale) + shift
        tl.store(out_ptr + start + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def adaln_modulate_backward_kernel(
    x_ptr,
    scale_ptr,
    grad_ptr,
    grad_x_ptr,
    partial_ptr,
    num_frames,
    tokens,
    rows_per_program,
    scale_stride_batch,
    scale_stride_frame,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of a strip of rows of one frame; partial sums of dshift and dscale over the strip, [2, WIDTH]."""
    frame = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    scale = _load_frame_row(scale_ptr, frame, num_frames, scale_stride_batch, scale_stride_frame, WIDTH, BLOCK)
    grad_shift = tl.zeros([BLOCK], tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, tokens)):
        start = (frame.to(tl.int64) * tokens + row) * WIDTH
        normed, inverse = _standardise(x_ptr, start, eps, WIDTH, BLOCK)
        grad = tl.load(grad_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        grad_shift += grad
        grad_scale += grad * normed
        grad_normed = grad * (1.0 + scale)
        mean = tl.sum(grad_normed, 0) / WIDTH
        projection = tl.sum(grad_normed * normed, 0) / WIDTH
        grad_x = inverse * (grad_normed - mean - normed * projection)
        tl.store(grad_x_ptr + start + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    out = partial_ptr + (frame.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2 * WIDTH + column
    tl.store(out, grad_shift, mask=mask)
    tl.store(out + WIDTH, grad_scale, mask=mask)


@triton.jit
def gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    num_frames,
    tokens,
    rows_per_program,
    gate_stride_batch,
    gate_stride_frame,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x + gate * y for a strip of rows of one frame."""
    frame = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = _load_frame_row(gate_ptr, frame, num_frames, gate_stride_batch, gate_stride_frame, WIDTH, BLOCK)
    first = tl.program_id(1) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, tokens)):
        offset = (frame.to(tl.int64) * tokens + row) * WIDTH + column
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, (x + gate * y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_residual_backward_kernel(
    y_ptr,
    gate_ptr,
    grad_ptr,
    grad_y_ptr,
    partial_ptr,
    num_frames,
    tokens,
    rows_per_program,
    gate_stride_batch,
    gate_stride_frame,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dy of a strip of rows of one frame; partial sum of dgate over the strip."""
    frame = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = _load_frame_row(gate_ptr, frame, num_frames, gate_stride_batch, gate_stride_frame, WIDTH, BLOCK)
    grad_gate = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, tokens)):
        offset = (frame.to(tl.int64) * tokens + row) * WIDTH + column
        y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad_gate += grad * y
        tl.store(grad_y_ptr + offset, (grad * gate).to(grad_y_ptr.dtype.element_ty), mask=mask)
    program = frame.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + program * WIDTH + column, grad_gate, mask=mask)


def _frames_and_strips(x: Tensor, num_frames: int, rows: int | None) -> tuple[int, int, int, int]:
    """(batch x frames, tokens per frame, rows per program, programs per frame); rows None: for a reduction."""
    batch, num_tokens, _ = x.shape
    tokens = num_tokens // num_frames
    per_program = min(rows, tokens) if rows else rows_per_program(tokens, batch * num_frames, x.device)
    return batch * num_frames, tokens, per_program, ceil_div(tokens, per_program)


@custom_op("afd_kernels::adaln_modulate", mutates_args=())
def adaln_modulate_op(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x contiguous [B, N, D]; shift, scale [B, F, D] with stride 1 along D."""
    frames, tokens, rows, strips = _frames_and_strips(x, shift.shape[1], FORWARD_ROWS)
    block = next_power_of_2(x.shape[2])
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    with device_guard(x):
        adaln_modulate_kernel[(frames, strips)](
            x, shift, scale, out, shift.shape[1], tokens, rows, *shift.stride()[:2], *scale.stride()[:2], eps,
            WIDTH=x.shape[2], BLOCK=block, num_warps=row_warps(block, x.dtype),
        )  # fmt: skip
    return out


@adaln_modulate_op.register_fake
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


@custom_op("afd_kernels::adaln_modulate_backward", mutates_args=())
def adaln_modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, N, D]; dshift, dscale [B, F, D] in scale's dtype."""
    frames, tokens, rows, strips = _frames_and_strips(x, scale.shape[1], None)
    width = x.shape[2]
    block = next_power_of_2(width)
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    partial = torch.empty((frames, strips, 2, width), device=x.device, dtype=torch.float32)
    with device_guard(x):
        adaln_modulate_backward_kernel[(frames, strips)](
            x, scale, grad.contiguous(), grad_x, partial, scale.shape[1], tokens, rows, *scale.stride()[:2], eps,
            WIDTH=width, BLOCK=block, num_warps=row_warps(block, x.dtype),
        )  # fmt: skip
    # Summed apart: outputs of a custom operator must not share memory.
    grad_shift, grad_scale = (partial[:, :, i].sum(1).to(scale.dtype).reshape(scale.shape) for i in range(2))
    return grad_x, grad_shift, grad_scale


@adaln_modulate_backward.register_fake
def _(grad, x, scale, eps):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@custom_op("afd_kernels::gated_residual", mutates_args=())
def gated_residual_op(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y contiguous [B, N, D]; gate [B, F, D] with stride 1 along D."""
    frames, tokens, rows, strips = _frames_and_strips(x, gate.shape[1], FORWARD_ROWS)
    block = next_power_of_2(x.shape[2])
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    with device_guard(x):
        gated_residual_kernel[(frames, strips)](
            x, y, gate, out, gate.shape[1], tokens, rows, *gate.stride()[:2],
            WIDTH=x.shape[2], BLOCK=block, num_warps=row_warps(block, x.dtype),
        )  # fmt: skip
    return out


@gated_residual_op.register_fake
def _(x, y, gate):
    return x.new_empty(x.shape)


@custom_op("afd_kernels::gated_residual_backward", mutates_args=())
def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dy [B, N, D]; dgate [B, F, D] in gate's dtype. (dx is grad itself.)"""
    frames, tokens, rows, strips = _frames_and_strips(y, gate.shape[1], None)
    width = y.shape[2]
    block = next_power_of_2(width)
    grad_y = torch.empty(y.shape, device=y.device, dtype=y.dtype)
    partial = torch.empty((frames, strips, width), device=y.device, dtype=torch.float32)
    with device_guard(y):
        gated_residual_backward_kernel[(frames, strips)](
            y, gate, grad.contiguous(), grad_y, partial, gate.shape[1], tokens, rows, *gate.stride()[:2],
            WIDTH=width, BLOCK=block, num_warps=row_warps(block, y.dtype),
        )  # fmt: skip
    return grad_y, partial.sum(1).to(gate.dtype).reshape(gate.shape)


@gated_residual_backward.register_fake
def _(grad, y, gate):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _setup_adaln(ctx, inputs, output):
    x, _, scale, eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.eps = eps


def _backward_adaln(ctx, grad):
    grad_x, grad_shift, grad_scale = adaln_modulate_backward(grad, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_shift, grad_scale, None


def _setup_gated(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward_gated(ctx, grad):
    return grad, *gated_residual_backward(grad, *ctx.saved_tensors)


adaln_modulate_op.register_autograd(_backward_adaln, setup_context=_setup_adaln)
gated_residual_op.register_autograd(_backward_gated, setup_context=_setup_gated)


def adaln_modulate_triton(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Return [B, N, D]; arguments as checked by `adaln_modulate`."""
    return adaln_modulate_op(x.contiguous(), _row_contiguous(shift), _row_contiguous(scale), eps)


def gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return [B, N, D]; arguments as checked by `gated_residual`."""
    return gated_residual_op(x.contiguous(), y.contiguous(), _row_contiguous(gate))


def _row_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
