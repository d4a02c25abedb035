"""Launches the Triton kernels of block-causal attention: work tables, autograd.

Owns how the kernels are launched; the kernels are in `block_causal_attention_kernels` (imported on first use, so that
importing this module does not import triton), their tile shapes in `attention_plans`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from afd_kernels.attention_plans import Plan, Tiles, check_variant, choose_plan, compute_capability
from afd_kernels.dispatch import is_interpreting
from afd_kernels.launching import device_guard
from afd_kernels.layout import BlockCausalLayout, Strip

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUP = 8  # tiles of one (batch, head) slice launched side by side, so that they share keys in L2


@functools.lru_cache(maxsize=64)
def work_table(strips: tuple[Strip, ...], block: int, device: torch.device) -> Tensor:
    """One row per tile, longest walk first: [tile start, strip end, three (start, end) ranges], int32 [tiles, 8].

    Args:
        strips: `layout.strips` for query tiles, `layout.key_strips` for key tiles.
        block: rows of a tile; tiles restart at every strip.
    """
    rows: list[tuple[int, list[int]]] = []
    for strip in strips:
        assert len(strip.ranges) <= 3, f"a strip sees at most 3 ranges, got {strip.ranges}"
        bounds = [edge for span in strip.ranges for edge in span]
        length = sum(end - start for start, end in strip.ranges)
        for start in range(strip.start, strip.end, block):
            rows.append((length, [start, strip.end, *bounds, *([0] * (6 - len(bounds)))]))
    rows.sort(key=lambda row: -row[0])
    return torch.tensor([row for _, row in rows], dtype=torch.int32).to(device)


def can_use_descriptors(*tensors: Tensor) -> bool:
    """Whether tensor descriptors accept the tensors: 16-byte aligned base and strides, rows not expanded."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(2) > 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def allow_descriptors(device: torch.device) -> None:
    """Give Triton scratch memory for descriptors that kernels build on the device."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Any:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def dense_rows(x: Tensor) -> Tensor:
    """x with unit stride over D; batch, head and row strides stay free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _most_ranges(strips: tuple[Strip, ...]) -> int:
    return max(len(strip.ranges) for strip in strips)


def usable_tiles(plan: Plan, kernel: str, *tensors: Tensor) -> Tiles:
    """The plan's tiles of a kernel, or pointer tiles where its descriptors do not accept the tensors."""
    tiles: Tiles = getattr(plan, kernel)
    if not tiles.tma or can_use_descriptors(*tensors):
        return tiles
    q = tensors[0]
    return getattr(choose_plan(q.shape[-1], q.dtype, "pointer", compute_capability(q.device)), kernel)


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float, plan: Plan) -> tuple:
    from afd_kernels.block_causal_attention_kernels import forward_kernel

    batch, heads, rows, head_dim = q.shape
    tiles = usable_tiles(plan, "forward", q, k, v)
    work = work_table(layout.strips, tiles.block_m, q.device)
    out = torch.empty_like(q)
    stats = torch.empty(batch * heads, 2, rows, dtype=torch.float32, device=q.device)
    if tiles.tma:
        allow_descriptors(q.device)
    with device_guard(q):
        launch: Any = forward_kernel[(work.shape[0] * batch * heads,)]
        launch(
            q, k, v, out, stats, work,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            heads, rows, work.shape[0], batch * heads, scale * math.log2(math.e),
            D=head_dim, RANGES=_most_ranges(layout.strips), GROUP=GROUP, SPECIALIZE=tiles.specialize,
            PRECISION=_precision(q.dtype), **tiles.launch_options,
        )  # fmt: skip
    return out, stats


def _backward(saved: tuple[Tensor, ...], grad: Tensor, layout: BlockCausalLayout, scale: float, plan: Plan) -> tuple:
    from afd_kernels.block_causal_attention_kernels import delta_kernel, key_value_grad_kernel, query_grad_kernel

    q, k, v, out, stats = saved
    batch, heads, rows, head_dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = (q, k, v, grad)
    strides = [stride for x in inputs for stride in x.stride()[:3]]
    scales = (scale, scale * math.log2(math.e))
    shared = {"D": head_dim, "GROUP": GROUP, "PRECISION": _precision(q.dtype)}
    if plan.key_value_grad.tma or plan.query_grad.tma:
        allow_descriptors(q.device)
    with device_guard(q):
        launch: Any = delta_kernel[(-(-rows // 64), batch * heads)]
        launch(out, grad, stats, *out.stride()[:3], *grad.stride()[:3], heads, rows, D=head_dim, BLOCK=64)
        tiles = usable_tiles(plan, "key_value_grad", *inputs)
        work = work_table(layout.key_strips, tiles.block_n, q.device)
        launch = key_value_grad_kernel[(work.shape[0] * batch * heads,)]
        launch(
            *inputs, stats, dk, dv, work, *strides, heads, rows, work.shape[0], batch * heads, *scales,
            RANGES=_most_ranges(layout.key_strips), SPECIALIZE=tiles.specialize, **shared, **tiles.launch_options,
        )  # fmt: skip
        tiles = usable_tiles(plan, "query_grad", *inputs)
        work = work_table(layout.strips, tiles.block_m, q.device)
        launch = query_grad_kernel[(work.shape[0] * batch * heads,)]
        launch(
            *inputs, stats, dq, work, *strides, heads, rows, work.shape[0], batch * heads, *scales,
            RANGES=_most_ranges(layout.strips), **shared, **tiles.launch_options,
        )  # fmt: skip
    return dq, dk, dv


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float, plan: Plan
    ) -> Tensor:
        out, stats = _forward(q, k, v, layout, scale, plan)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.layout, ctx.scale, ctx.plan = layout, scale, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = _backward(ctx.saved_tensors, dense_rows(grad_out), ctx.layout, ctx.scale, ctx.plan)
        return (*grads, None, None, None)


def check_support(device: torch.device, dtype: torch.dtype, head_dim: int, variant: str | None = None) -> None:
    """Check that the kernels run on such inputs.

    Raises:
        ValueError: device, dtype, head dimension or variant is outside what the kernels do.
    """
    if device.type != "cuda" and not is_interpreting():
        raise ValueError(f"impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1 on CPU), got {device}")
    if dtype not in DTYPES:
        raise ValueError(f"impl='triton' takes float16, bfloat16 or float32, got {dtype}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"impl='triton' takes head dimensions {HEAD_DIMS}, got {head_dim}")
    check_variant(variant, compute_capability(device))


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale to use: > 0, or 1 / sqrt(D) for None.

    Raises:
        ValueError: the scale is not positive.
    """
    if scale is not None and scale <= 0:
        raise ValueError(f"impl='triton' takes a positive scale, got {scale}")
    return scale if scale is not None else 1 / math.sqrt(q.shape[-1])


def block_causal_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockCausalLayout,
    *,
    scale: float | None = None,
    variant: str | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Block-causal attention by our kernels; forward and backward are deterministic (no atomics).

    Args:
        q, k, v: [B, heads, N, D] float16, bfloat16 or float32, D in HEAD_DIMS, N == layout.num_tokens.
        scale: > 0; None for 1 / sqrt(D).
        variant: one of `attention_plans.VARIANTS` (float16 and bfloat16 with D >= 64); None for the device's preferred.
        plan: tile shapes, instead of the variant's.
    Returns:
        [B, heads, N, D] in q's dtype and strides.
    Raises:
        ValueError: see `check_support` and `scale_of`.
    """
    check_support(q.device, q.dtype, q.shape[-1], variant)
    factor = scale_of(q, scale)
    plan = plan or choose_plan(q.shape[-1], q.dtype, variant, compute_capability(q.device))
    return _TritonAttention.apply(  # pyright: ignore[reportReturnType]
        dense_rows(q), dense_rows(k), dense_rows(v), layout, factor, plan
    )
