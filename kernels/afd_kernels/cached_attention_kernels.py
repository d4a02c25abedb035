"""Triton kernels of cached attention: one split of the keys per program, and the kernel that joins the splits."""

# Kernel code is Triton's own language, which Python's type rules do not describe.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

from afd_kernels.attention_tiles import load_tile, softmax_step, tile_rows


@triton.jit(do_not_specialize=["start_0", "end_0", "start_1", "end_1", "per_split"])
def split_kernel(
    q, k, v, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, num_slices, q_rows, k_rows, start_0, end_0, start_1, end_1, per_split, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries to the key tiles [split * per_split, ...) of two ranges; scale includes log2(e).

    out [splits, slices, q_rows, D] float32 is normalised within the split; lse [splits, slices, q_rows] is base 2.
    """
    split, piece = tl.program_id(2), tl.program_id(1)
    batch, head = (piece // heads).to(tl.int64), (piece % heads).to(tl.int64)
    own = tl.program_id(0) * BLOCK_M
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    is_own = own + m < q_rows
    rows = (own + m).to(tl.int64)
    q_tiles = tile_rows(q + batch * q_batch + head * q_head, q_rows, q_row, D, BLOCK_M, TMA)
    k_tiles = tile_rows(k + batch * k_batch + head * k_head, k_rows, k_row, D, BLOCK_N, TMA)
    v_tiles = tile_rows(v + batch * v_batch + head * v_head, k_rows, v_row, D, BLOCK_N, TMA)
    queries = load_tile(q_tiles, own, q_row, is_own, TMA)

    tiles_0 = tl.cdiv(end_0 - start_0, BLOCK_N)
    total = tiles_0 + tl.cdiv(end_1 - start_1, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for i in tl.range(split * per_split, tl.minimum(total, (split + 1) * per_split)):
        is_later = i >= tiles_0
        position = tl.where(is_later, start_1 + (i - tiles_0) * BLOCK_N, start_0 + i * BLOCK_N)
        is_key = n < tl.where(is_later, end_1, end_0) - position
        peak, weight, acc = softmax_step(
            queries, k_tiles, v_tiles, k_row, v_row, position, is_key, peak, weight, acc, scale, TMA, PRECISION
        )

    flat = (split * num_slices + piece).to(tl.int64) * q_rows + rows
    tl.store(out + flat[:, None] * D + d[None, :], acc / weight[:, None], mask=is_own[:, None])
    tl.store(lse + flat, peak + tl.math.log2(weight), mask=is_own)


@triton.jit
def join_kernel(
    parts, lse, out, out_batch, out_head, out_row, heads, num_slices, q_rows,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum over splits of parts * exp2(lse), over the sum of exp2(lse)."""
    piece = tl.program_id(1)
    batch, head = (piece // heads).to(tl.int64), (piece % heads).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    is_row = row < q_rows
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        peak = tl.maximum(
            peak, tl.load(lse + (piece + split * num_slices).to(tl.int64) * q_rows + row, mask=is_row, other=0.0)
        )
    weight = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for split in tl.static_range(SPLITS):
        flat = (piece + split * num_slices).to(tl.int64) * q_rows + row
        share = tl.math.exp2(tl.load(lse + flat, mask=is_row, other=0.0) - peak)
        part = tl.load(
            parts + flat[:, None] * D + d[None, :], mask=is_row[:, None], other=0.0
        )  # fmt: skip
        weight += share
        acc += part * share[:, None]
    acc = acc / weight[:, None]
    out += batch * out_batch + head * out_head
    tl.store(out + row[:, None] * out_row + d[None, :], acc.to(out.dtype.element_ty), mask=is_row[:, None])
