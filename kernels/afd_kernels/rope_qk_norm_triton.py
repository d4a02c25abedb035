"""Triton RMSNorm + 3-D RoPE for queries and keys: one token row per program forward, a strip of rows backward.

A row is the full width (all heads) in registers; adjacent elements (2p, 2p + 1) form pair p, whose angle is column
p % (head_dim / 2) of the token's table row. The result goes to [B, heads, N, head_dim] by strides, which may be those
of a KV cache. Derivation: kernels/README.md.
"""

# Triton ships no types for kernel launches and for the language inside kernels.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from afd_kernels.launching import ceil_div, device_guard, next_power_of_2, row_warps, rows_per_program


@triton.jit
def _normalise(x_ptr, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, eps):
    """One row x [BLOCK] in float32, its 1 / rms, and n = x / rms rounded to the row's dtype, in float32."""
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / WIDTH + eps)
    return x, scale, (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _rotate(y, cosine, sine, BLOCK: tl.constexpr):
    """Turn adjacent pairs of y [BLOCK] by the angles [BLOCK / 2]."""
    first, second = tl.split(tl.reshape(y, [BLOCK // 2, 2]))
    turned = tl.join(first * cosine - second * sine, first * sine + second * cosine)
    return tl.reshape(turned, [BLOCK])


@triton.jit
def _load_angles(cos_ptr, sin_ptr, token, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine per pair of the full width [BLOCK / 2]."""
    pair = tl.arange(0, BLOCK // 2)
    offset = token * (HEAD_DIM // 2) + pair % (HEAD_DIM // 2)
    mask = pair < WIDTH // 2
    cosine = tl.load(cos_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return cosine, tl.load(sin_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rope_qk_norm_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    num_tokens,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    k_stride_batch,
    k_stride_head,
    k_stride_token,
    eps,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of q and k: normalise over the width, times weight, rotate, store by head."""
    row = tl.program_id(0)  # divided as 32-bit (a 64-bit division is a subroutine), addressed as 64-bit
    batch, token = (row // num_tokens).to(tl.int64), (row % num_tokens).to(tl.int64)
    row = row.to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    head, dim = column // HEAD_DIM, column % HEAD_DIM
    cosine, sine = _load_angles(cos_ptr, sin_ptr, token, WIDTH, HEAD_DIM, BLOCK)
    _, _, q = _normalise(q_ptr, row * WIDTH, WIDTH, BLOCK, eps)
    q *= tl.load(q_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    _, _, k = _normalise(k_ptr, row * WIDTH, WIDTH, BLOCK, eps)
    k *= tl.load(k_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    q_start = q_out_ptr + batch * q_stride_batch + token * q_stride_token
    k_start = k_out_ptr + batch * k_stride_batch + token * k_stride_token
    q_out = _rotate(q, cosine, sine, BLOCK).to(q_out_ptr.dtype.element_ty)
    tl.store(q_start + head.to(tl.int64) * q_stride_head + dim, q_out, mask=mask)
    k_out = _rotate(k, cosine, sine, BLOCK).to(k_out_ptr.dtype.element_ty)
    tl.store(k_start + head.to(tl.int64) * k_stride_head + dim, k_out, mask=mask)


@triton.jit
def _row_gradient(
    x_ptr,
    weight,
    grad_start,
    grad_offset,
    grad_x_ptr,
    start,
    cosine,
    sine,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dx of one row; return dy * n, the row's share of the weight's gradient."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x, scale, normed = _normalise(x_ptr, start, WIDTH, BLOCK, eps)
    grad = tl.load(grad_start + grad_offset, mask=mask, other=0.0).to(tl.float32)
    grad = _rotate(grad, cosine, -sine, BLOCK)
    grad_normed = grad * weight
    projection = tl.sum(grad_normed * x, 0) * scale * scale / WIDTH
    grad_x = scale * (grad_normed - x * projection)
    tl.store(grad_x_ptr + start + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    return grad * normed


@triton.jit
def rope_qk_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_tokens,
    rows_per_program,
    grad_stride_batch,
    grad_stride_head,
    grad_stride_token,
    eps,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of a strip of rows of q or k, and the strip's partial sum of the weight's gradient [WIDTH]."""
    program = tl.program_id(0)
    wide = tl.zeros([], tl.int64)  # makes an index 64-bit after its 32-bit division
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    head, dim = column // HEAD_DIM, column % HEAD_DIM
    grad_offset = head.to(tl.int64) * grad_stride_head + dim
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        batch, token = wide + row // num_tokens, wide + row % num_tokens
        cosine, sine = _load_angles(cos_ptr, sin_ptr, token, WIDTH, HEAD_DIM, BLOCK)
        grad_start = grad_ptr + batch * grad_stride_batch + token * grad_stride_token
        grad_weight += _row_gradient(
            x_ptr, weight, grad_start, grad_offset, grad_x_ptr, (wide + row) * WIDTH, cosine, sine, eps, WIDTH, BLOCK
        )
    tl.store(partial_ptr + (wide + program) * WIDTH + column, grad_weight, mask=mask)


def _launch_forward(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps) -> None:
    batch, num_tokens, width = q.shape
    block = next_power_of_2(width)
    with device_guard(q):
        rope_qk_norm_kernel[(batch * num_tokens,)](
            q, k, q_weight, k_weight, cos, sin, q_out, k_out, num_tokens, *q_out.stride()[:3], *k_out.stride()[:3],
            eps, WIDTH=width, HEAD_DIM=q_out.shape[-1], BLOCK=block, num_warps=row_warps(block, q.dtype),
        )  # fmt: skip


@custom_op("afd_kernels::rope_qk_norm", mutates_args=())
def rope_qk_norm_op(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q, k [B, heads, N, head_dim] from contiguous [B, N, width]."""
    batch, num_tokens, width = q.shape
    shape = (batch, num_heads, num_tokens, width // num_heads)
    q_out = torch.empty(shape, device=q.device, dtype=q.dtype)
    k_out = torch.empty(shape, device=q.device, dtype=q.dtype)
    _launch_forward(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps)
    return q_out, k_out


@rope_qk_norm_op.register_fake
def _(q, k, q_weight, k_weight, cos, sin, num_heads, eps):
    shape = (q.shape[0], num_heads, q.shape[1], q.shape[2] // num_heads)
    return q.new_empty(shape), q.new_empty(shape)


@custom_op("afd_kernels::rope_qk_norm_into_cache", mutates_args=("k_out",))
def rope_qk_norm_into_cache(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_out: Tensor,
    eps: float,
) -> Tensor:
    """q [B, heads, N, head_dim]; k is written into `k_out` of that shape and any outer strides."""
    q_out = torch.empty(k_out.shape, device=q.device, dtype=q.dtype)
    _launch_forward(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps)
    return q_out


@rope_qk_norm_into_cache.register_fake
def _(q, k, q_weight, k_weight, cos, sin, k_out, eps):
    return q.new_empty(k_out.shape)


@custom_op("afd_kernels::rope_qk_norm_backward", mutates_args=())
def rope_qk_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dx [B, N, width] in x's dtype and dweight [width] in weight's, for grad [B, heads, N, head_dim]."""
    batch, num_tokens, width = x.shape
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    num_rows, block = batch * num_tokens, next_power_of_2(width)
    rows = rows_per_program(num_rows, 1, x.device)
    programs = ceil_div(num_rows, rows)
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    partial = torch.empty((programs, width), device=x.device, dtype=torch.float32)
    with device_guard(x):
        rope_qk_norm_backward_kernel[(programs,)](
            x, weight, cos, sin, grad, grad_x, partial, num_rows, num_tokens, rows, *grad.stride()[:3], eps,
            WIDTH=width, HEAD_DIM=grad.shape[-1], BLOCK=block, num_warps=row_warps(block, x.dtype),
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


@rope_qk_norm_backward.register_fake
def _(grad, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, _, eps = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
    ctx.eps = eps


def _backward(ctx, grad_q_out, grad_k_out):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    grad_q, grad_q_weight = rope_qk_norm_backward(grad_q_out, q, q_weight, cos, sin, ctx.eps)
    grad_k, grad_k_weight = rope_qk_norm_backward(grad_k_out, k, k_weight, cos, sin, ctx.eps)
    return grad_q, grad_k, grad_q_weight, grad_k_weight, None, None, None, None


rope_qk_norm_op.register_autograd(_backward, setup_context=_setup_context)


def rope_qk_norm_triton(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (q, k) [B, num_heads, N, head_dim]; arguments as checked by `rope_qk_norm`."""
    inputs = [x.contiguous() for x in (q, k, q_weight, k_weight, cos, sin)]
    if k_out is None:
        return rope_qk_norm_op(*inputs, num_heads, eps)
    return rope_qk_norm_into_cache(*inputs, k_out, eps), k_out
