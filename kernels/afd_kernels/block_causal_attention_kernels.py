"""Triton kernels of block-causal attention: forward, delta, dK/dV, dQ.

Every program owns one tile of one strip (a chunk of queries, or a span of keys in dK/dV) and walks the ranges the strip
sees, as one loop over tiles. `work` has one row per program, [tile_start, strip_end, three (start, end) ranges], long
walks first. Tiles restart at every strip, so the walking side needs one tail test per tile and the owning side none
until it stores. Softmax runs in base 2. `stats` [slices, 2, rows] float32 holds, per row of a (batch, head) slice,
log2(sum exp2(scores)) and delta.

Addresses are 64-bit: strides multiply 64-bit indices. Launches live in `block_causal_attention_triton`. Source of the
schedule: the FlashAttention-2 paper (arXiv 2307.08691), algorithms 1 and 2; grouped program order as in Triton's matrix
multiplication tutorial.
"""

# Kernel code is Triton's own language, which Python's type rules do not describe.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

from afd_kernels.attention_tiles import load_tile, score_grads, softmax_step, softmax_weights, tile_rows


@triton.jit
def _program(num_tiles, num_slices, GROUP: tl.constexpr):
    """Program -> (tile, slice): GROUP tiles of one (batch, head) slice run side by side and share its keys in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP * num_slices) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    inside = pid - first * num_slices
    return first + inside % size, inside // size


@triton.jit
def _ranges(work, tile, BLOCK: tl.constexpr, RANGES: tl.constexpr):
    """One row of the work table: tile start, strip end, three ranges (unused ones empty), tiles per range."""
    row = work + tile * 8
    own = tl.load(row)
    own_end = tl.load(row + 1)
    start_0, end_0 = tl.load(row + 2), tl.load(row + 3)
    start_1, end_1, start_2, end_2 = 0, 0, 0, 0
    if RANGES > 1:
        start_1, end_1 = tl.load(row + 4), tl.load(row + 5)
    if RANGES > 2:
        start_2, end_2 = tl.load(row + 6), tl.load(row + 7)
    tiles_0, tiles_1 = tl.cdiv(end_0 - start_0, BLOCK), tl.cdiv(end_1 - start_1, BLOCK)
    total = tiles_0 + tiles_1 + tl.cdiv(end_2 - start_2, BLOCK)
    return own, own_end, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, total


@triton.jit
def _locate(
    i, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, BLOCK: tl.constexpr, RANGES: tl.constexpr
):
    """Step i of the walk -> (first row of the tile, end of its range)."""
    position, end = start_0 + i * BLOCK, end_0
    if RANGES > 1:
        is_later = i >= tiles_0
        position = tl.where(is_later, start_1 + (i - tiles_0) * BLOCK, position)
        end = tl.where(is_later, end_1, end)
    if RANGES > 2:
        is_last = i >= tiles_0 + tiles_1
        position = tl.where(is_last, start_2 + (i - tiles_0 - tiles_1) * BLOCK, position)
        end = tl.where(is_last, end_2, end)
    return position, end


@triton.jit
def forward_kernel(
    q, k, v, out, stats, work,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, rows, num_tiles, num_slices, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANGES: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax2(scale q k^T) v for one tile of BLOCK_M queries; scale includes log2(e)."""
    tile, piece = _program(num_tiles, num_slices, GROUP)
    batch, head = (piece // heads).to(tl.int64), (piece % heads).to(tl.int64)
    own, own_end, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, total = _ranges(
        work, tile, BLOCK_N, RANGES
    )
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    is_own = m < own_end - own
    q_rows = (own + m).to(tl.int64)
    q_tiles = tile_rows(q + batch * q_batch + head * q_head, rows, q_row, D, BLOCK_M, TMA)
    k_tiles = tile_rows(k + batch * k_batch + head * k_head, rows, k_row, D, BLOCK_N, TMA)
    v_tiles = tile_rows(v + batch * v_batch + head * v_head, rows, v_row, D, BLOCK_N, TMA)
    queries = load_tile(q_tiles, own, q_row, is_own, TMA)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for i in tl.range(0, total, warp_specialize=SPECIALIZE):
        position, end = _locate(
            i, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, BLOCK_N, RANGES
        )  # fmt: skip
        peak, weight, acc = softmax_step(
            queries, k_tiles, v_tiles, k_row, v_row, position, n < end - position, peak, weight, acc, scale,
            TMA, PRECISION,
        )  # fmt: skip

    acc = acc / weight[:, None]
    out_offsets = batch * out_batch + head * out_head + q_rows[:, None] * out_row + d[None, :]
    tl.store(out + out_offsets, acc.to(out.dtype.element_ty), mask=is_own[:, None])
    tl.store(stats + piece.to(tl.int64) * 2 * rows + q_rows, peak + tl.math.log2(weight), mask=is_own)


@triton.jit
def delta_kernel(
    out, grad, stats, out_batch, out_head, out_row, grad_batch, grad_head, grad_row, heads, rows,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * grad, into the second row of every slice of `stats`."""
    piece = tl.program_id(1)
    batch, head = (piece // heads).to(tl.int64), (piece % heads).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    is_row = row < rows
    o = tl.load(
        out + batch * out_batch + head * out_head + row[:, None] * out_row + d[None, :], mask=is_row[:, None], other=0.0
    )
    g = tl.load(
        grad + batch * grad_batch + head * grad_head + row[:, None] * grad_row + d[None, :],
        mask=is_row[:, None],
        other=0.0,
    )
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(stats + (piece.to(tl.int64) * 2 + 1) * rows + row, total, mask=is_row)


@triton.jit
def key_value_grad_kernel(
    q, k, v, grad, stats, dk, dv, work,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    heads, rows, num_tiles, num_slices, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANGES: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV (contiguous) of one tile of BLOCK_N keys, walking the queries that see it; scores are transposed."""
    tile, piece = _program(num_tiles, num_slices, GROUP)
    batch, head = (piece // heads).to(tl.int64), (piece % heads).to(tl.int64)
    own, own_end, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, total = _ranges(
        work, tile, BLOCK_M, RANGES
    )
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    is_own = n < own_end - own
    q_tiles = tile_rows(q + batch * q_batch + head * q_head, rows, q_row, D, BLOCK_M, TMA)
    g_tiles = tile_rows(grad + batch * g_batch + head * g_head, rows, g_row, D, BLOCK_M, TMA)
    k_tiles = tile_rows(k + batch * k_batch + head * k_head, rows, k_row, D, BLOCK_N, TMA)
    v_tiles = tile_rows(v + batch * v_batch + head * v_head, rows, v_row, D, BLOCK_N, TMA)
    keys, values = load_tile(k_tiles, own, k_row, is_own, TMA), load_tile(v_tiles, own, v_row, is_own, TMA)
    stats += piece.to(tl.int64) * 2 * rows

    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    for i in tl.range(0, total, warp_specialize=SPECIALIZE):
        position, end = _locate(
            i, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, BLOCK_M, RANGES
        )  # fmt: skip
        is_query = m < end - position
        queries = load_tile(q_tiles, position, q_row, is_query, TMA)
        # Queries past the range weigh nothing: exp2(x - inf) = 0.
        level = tl.load(stats + position + m, mask=is_query, other=float("inf"))
        p = softmax_weights(keys, queries, level[None, :], scale_log2, PRECISION)
        g = load_tile(g_tiles, position, g_row, is_query, TMA)
        dv_acc = tl.dot(p.to(g.dtype), g, dv_acc, input_precision=PRECISION)
        mean = tl.load(stats + rows + position + m, mask=is_query, other=0.0)
        ds = score_grads(p, values, g, mean[None, :], PRECISION)
        dk_acc = tl.dot(ds.to(queries.dtype), queries, dk_acc, input_precision=PRECISION)

    # Read again rather than kept: every register counts in the loop.
    own = tl.load(work + tile * 8, volatile=True)
    own_end = tl.load(work + tile * 8 + 1, volatile=True)
    is_own = (n < own_end - own)[:, None]
    flat = ((piece.to(tl.int64) * rows + own + n) * D)[:, None] + d[None, :]
    tl.store(dk + flat, (dk_acc * scale).to(dk.dtype.element_ty), mask=is_own)
    tl.store(dv + flat, dv_acc.to(dv.dtype.element_ty), mask=is_own)


@triton.jit
def query_grad_kernel(
    q, k, v, grad, stats, dq, work,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    heads, rows, num_tiles, num_slices, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANGES: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (contiguous) of one tile of BLOCK_M queries, walking the keys it sees."""
    tile, piece = _program(num_tiles, num_slices, GROUP)
    batch, head = (piece // heads).to(tl.int64), (piece % heads).to(tl.int64)
    own, own_end, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, total = _ranges(
        work, tile, BLOCK_N, RANGES
    )
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    is_own = m < own_end - own
    stats += piece.to(tl.int64) * 2 * rows + own + m
    level = tl.load(stats, mask=is_own, other=float("inf"))
    mean = tl.load(stats + rows, mask=is_own, other=0.0)
    q_tiles = tile_rows(q + batch * q_batch + head * q_head, rows, q_row, D, BLOCK_M, TMA)
    g_tiles = tile_rows(grad + batch * g_batch + head * g_head, rows, g_row, D, BLOCK_M, TMA)
    k_tiles = tile_rows(k + batch * k_batch + head * k_head, rows, k_row, D, BLOCK_N, TMA)
    v_tiles = tile_rows(v + batch * v_batch + head * v_head, rows, v_row, D, BLOCK_N, TMA)
    queries, g = load_tile(q_tiles, own, q_row, is_own, TMA), load_tile(g_tiles, own, g_row, is_own, TMA)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for i in tl.range(0, total):
        position, end = _locate(
            i, start_0, end_0, start_1, end_1, start_2, end_2, tiles_0, tiles_1, BLOCK_N, RANGES
        )  # fmt: skip
        is_key = n < end - position
        keys = load_tile(k_tiles, position, k_row, is_key, TMA)
        values = load_tile(v_tiles, position, v_row, is_key, TMA)
        p = softmax_weights(queries, keys, level[:, None], scale_log2, PRECISION)
        ds = score_grads(p, g, values, mean[:, None], PRECISION)
        ds = tl.where(is_key[None, :], ds, 0.0)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)

    flat = ((piece.to(tl.int64) * rows + own + m) * D)[:, None] + d[None, :]
    tl.store(dq + flat, (acc * scale).to(dq.dtype.element_ty), mask=is_own[:, None])
