"""What the attention kernels share inside their loops: loading a tile of rows, one step of softmax, score gradients.

Triton device code, inlined into `block_causal_attention_kernels` and `cached_attention_kernels`. Row positions are
32-bit; addresses are 64-bit, because strides multiply 64-bit indices.
"""

# Kernel code is Triton's own language, which Python's type rules do not describe.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def tile_rows(base, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """What `load_tile` needs to load tiles [BLOCK, D] of a matrix [rows, D]: a descriptor, or the first pointers."""
    if TMA:
        tiles = tl.make_tensor_descriptor(base, [rows, D], [stride, 1], [BLOCK, D])
    else:
        tiles = base + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tiles


@triton.jit
def load_tile(tiles, position, stride, is_row, TMA: tl.constexpr):
    """Rows [position, position + BLOCK); a descriptor gives zeros past the matrix only, pointers past `is_row`."""
    if TMA:
        tile = tiles.load([position, 0])
    else:
        tile = tl.load(tiles + position.to(tl.int64) * stride, mask=is_row[:, None], other=0.0)
    return tile


@triton.jit
def softmax_step(
    queries, k_tiles, v_tiles, k_row, v_row, position, is_key, peak, weight, acc, scale,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to a running softmax in base 2: (peak, weight, acc), rows x (max, sum, weighted values)."""
    keys = load_tile(k_tiles, position, k_row, is_key, TMA)
    scores = tl.dot(queries, keys.T, input_precision=PRECISION)
    scores = tl.where(is_key[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - new_peak[:, None])
    shrink = tl.math.exp2(peak - new_peak)
    weight = weight * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    values = load_tile(v_tiles, position, v_row, is_key, TMA)
    acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return new_peak, weight, acc


@triton.jit
def softmax_weights(own, other, level, scale_log2, PRECISION: tl.constexpr):
    """p = 2^(scale own other^T - level), [own rows, other rows]; own are keys (dK, dV) or queries (dQ).

    level, per query, is log2 of the row's sum and broadcasts; +inf makes a query's weights zero.
    """
    scores = tl.dot(own, other.T, input_precision=PRECISION)
    return tl.math.exp2(scores * scale_log2 - level)


@triton.jit
def score_grads(p, own, other, mean, PRECISION: tl.constexpr):
    """dS / scale = p (own other^T - mean), as p; own are values and other output gradients (dK, dV), or the reverse.

    The product starts from -mean: a subtraction afterwards keeps more registers alive, and spills.
    """
    return p * tl.dot(own, other.T, tl.broadcast_to(-mean, p.shape), input_precision=PRECISION)
