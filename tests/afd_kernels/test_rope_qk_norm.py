"""RMSNorm + 3-D RoPE: the table, the reference against a naive complex computation, argument errors."""

import pytest
import torch

from afd_kernels import rope_3d_table, rope_qk_norm

GRID, HEADS, HEAD_DIM = (5, 2, 3), 2, 16


def naive_angles(grid, head_dim, frame_offset):
    """Angle of every token and pair, one Python loop per index: [N, head_dim // 2]."""
    axis = 2 * (head_dim // 6)
    rows = []
    for frame in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                row = []
                for position, dim in ((frame + frame_offset, head_dim - 2 * axis), (y, axis), (x, axis)):
                    row += [position * 10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
                rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tokens, width = GRID[0] * GRID[1] * GRID[2], HEADS * HEAD_DIM
    q, k = (torch.randn(2, tokens, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    first, second = (torch.randn(width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return q, k, first, second


@pytest.mark.parametrize("frame_offset", [0, 18])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_table_has_the_naive_angles(frame_offset, head_dim):
    angle = naive_angles(GRID, head_dim, frame_offset)
    cos, sin = rope_3d_table(*GRID, head_dim, frame_offset=frame_offset, dtype=torch.float64)
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-12)


def test_head_dim_128_splits_into_44_42_42():
    cos, sin = rope_3d_table(2, 2, 2, 128, dtype=torch.float64)
    still = (sin == 0) & (cos == 1)
    assert still[1].tolist() == [True] * 43 + [False] * 21  # token (0, 0, 1): only the last 42 / 2 pairs turn
    assert still[2].tolist() == [True] * 22 + [False] * 21 + [True] * 21
    assert still[4].tolist() == [False] * 22 + [True] * 42


def test_float32_table_is_exact_to_rounding_far_into_a_rollout():
    exact = rope_3d_table(1, 2, 2, 128, frame_offset=10_000, dtype=torch.float64)
    rounded = rope_3d_table(1, 2, 2, 128, frame_offset=10_000)
    for a, b in zip(rounded, exact, strict=True):
        assert (a.double() - b).abs().max() < 6e-8


def test_reference_is_norm_then_complex_rotation():
    q, k, q_weight, k_weight = draw()
    table = rope_3d_table(*GRID, HEAD_DIM, frame_offset=3, dtype=torch.float64)
    rotation = torch.polar(torch.ones(()).double(), naive_angles(GRID, HEAD_DIM, 3))
    for actual, x, weight in zip(
        rope_qk_norm(q, k, q_weight, k_weight, *table, num_heads=HEADS), (q, k), (q_weight, k_weight), strict=True
    ):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        heads = normed.view(2, -1, HEADS, HEAD_DIM // 2, 2).transpose(1, 2).contiguous()
        expected = torch.view_as_real(torch.view_as_complex(heads) * rotation).flatten(-2)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_rotation_keeps_scores_relative_in_time():
    q, k, q_weight, k_weight = draw()
    scores = []
    for offset in (0, 11):
        table = rope_3d_table(*GRID, HEAD_DIM, frame_offset=offset, dtype=torch.float64)
        a, b = rope_qk_norm(q, k, q_weight, k_weight, *table, num_heads=HEADS)
        scores.append(a @ b.transpose(-1, -2))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)


def test_gradients_pass_gradcheck():
    q, k, q_weight, k_weight = (x[..., :12].clone().requires_grad_() for x in draw())
    table = rope_3d_table(*GRID, 6, dtype=torch.float64)
    inputs = (q[:1, :4].detach().requires_grad_(), k[:1, :4].detach().requires_grad_(), q_weight, k_weight)
    cos, sin = (x[:4] for x in table)
    assert torch.autograd.gradcheck(lambda *x: rope_qk_norm(x[0], x[1], x[2], x[3], cos, sin, num_heads=2), inputs)


def test_keys_are_written_into_a_cache_slice():
    q, k, q_weight, k_weight = draw(torch.float32)
    cos, sin = rope_3d_table(*GRID, HEAD_DIM)
    cache = torch.zeros(2, HEADS, 50, HEAD_DIM)
    inputs = (q, k, q_weight, k_weight, cos, sin)
    cached_q, cached_k = rope_qk_norm(*inputs, num_heads=HEADS, k_out=cache[:, :, 10:40])
    expected_q, expected_k = rope_qk_norm(*inputs, num_heads=HEADS)
    assert torch.equal(cached_q, expected_q)
    assert torch.equal(cache[:, :, 10:40], expected_k)
    assert cached_k.data_ptr() == cache[:, :, 10:40].data_ptr()


def test_cache_slice_and_gradient_exclude_each_other():
    q, k, q_weight, k_weight = draw(torch.float32)
    out = torch.zeros(2, HEADS, q.shape[1], HEAD_DIM)
    table = rope_3d_table(*GRID, HEAD_DIM)
    with pytest.raises(ValueError, match="k_out must be None when a gradient is needed"):
        rope_qk_norm(q.requires_grad_(), k, q_weight, k_weight, *table, num_heads=HEADS, k_out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 30, 31)}, r"k must have shape \[2, 30, 32\], got \[2, 30, 31\]"),
        ({"k": torch.zeros(2, 30, 32).bfloat16()}, "k must be torch.float32, got torch.bfloat16"),
        ({"num_heads": 3}, "num_heads must divide width 32 into an even head_dim, got 3"),
        ({"num_heads": 32}, "num_heads must divide width 32 into an even head_dim, got 32"),
        ({"cos": torch.zeros(29, 8)}, r"cos must have shape \[30, 8\], got \[29, 8\]"),
        ({"q_weight": torch.zeros(16)}, r"q_weight must have shape \[32\], got \[16\]"),
        ({"q": torch.zeros(30, 32)}, r"q must be \[B, N, width\], got \[30, 32\]"),
        ({"k_out": torch.zeros(2, 2, 16, 30).mT}, "k_out must have stride 1 along head_dim"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, q_weight, k_weight = draw(torch.float32)
    cos, sin = rope_3d_table(*GRID, HEAD_DIM)
    named = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "num_heads": HEADS}
    with pytest.raises(ValueError, match=message):
        rope_qk_norm(**{**named, **change})


@pytest.mark.parametrize(("sizes", "head_dim"), [((0, 2, 2), 16), ((2, 2, 2), 15)])
def test_wrong_table_sizes_are_named(sizes, head_dim):
    frames, height, width = sizes
    with pytest.raises(ValueError, match="must be"):
        rope_3d_table(frames, height, width, head_dim)
