"""Cached attention on the CPU: a rollout's steps equal the layout's forward; ranges, choice of splits, errors."""

import pytest
import torch

from afd_kernels import BlockCausalLayout, block_causal_attention, cached_attention
from afd_kernels.attention_plans import choose_splits


@pytest.mark.parametrize("impl", ["reference", "sdpa", None])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("first", [None, 1])
def test_steps_against_a_cache_equal_the_teacher_forced_forward(impl, window, first):
    layout = BlockCausalLayout(7, 4, 2, window, 1, first, teacher_forcing=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, layout.num_tokens, 8, generator=generator).double() for _ in range(3))
    expected = block_causal_attention(q, k, v, layout, impl="reference")
    clean, noisy = slice(0, layout.video_tokens), slice(layout.video_tokens, None)
    cache_k, cache_v = torch.full_like(k[:, :, clean], 1e3), torch.full_like(v[:, :, clean], 1e3)
    for chunk, span in enumerate(layout.chunk_spans):
        rows = slice(*(frame * 4 for frame in span))
        ranges = tuple((start * 4, end * 4) for start, end in layout.visible_frames(chunk))
        for copy in (noisy, clean):
            queries, keys, values = (x[:, :, copy][:, :, rows] for x in (q, k, v))
            cache_k[:, :, rows], cache_v[:, :, rows] = keys, values
            out = cached_attention(queries, cache_k, cache_v, impl=impl, key_ranges=ranges)
            torch.testing.assert_close(out, expected[:, :, copy][:, :, rows])


def test_all_keys_without_ranges():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    expected = torch.softmax(0.3 * q @ k.transpose(-1, -2), -1) @ v
    torch.testing.assert_close(cached_attention(q, k, v, scale=0.3), expected)
    torch.testing.assert_close(cached_attention(q, k, v, scale=0.3, impl="reference"), expected)


def test_splits_fill_the_processors():
    one_frame = 13 * 12  # query tiles x heads of Wan-1.3B
    assert choose_splits(one_frame, 256, 132) == 3  # 468 programs on 4 x 132: 89 % busy instead of 59 %
    assert choose_splits(132, 256, 132) == 1
    assert choose_splits(1, 256, 132) == 8
    assert choose_splits(1, 3, 132) == 1


def test_wrong_inputs_are_named():
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"k must be \[B, heads, keys, D\] for q \[1, 2, 3, 4\], got \[1, 1, 5, 4\]"):
        cached_attention(q, k[:, :1], k)
    with pytest.raises(ValueError, match=r"v must have k's shape \[1, 2, 5, 4\], got \[1, 2, 4, 4\]"):
        cached_attention(q, k, k[:, :, :4])
    with pytest.raises(ValueError, match=r"k and v must be torch.float32 like q, got torch.float64 and torch.float32"):
        cached_attention(q, k.double(), k)
    with pytest.raises(ValueError, match=r"impl must be one of reference, sdpa, .*, got 'magic'"):
        cached_attention(q, k, k, impl="magic")
    with pytest.raises(ValueError, match=r"non-empty spans of \[0, 5\), got \(\(0, 6\),\)"):
        cached_attention(q, k, k, key_ranges=((0, 6),))
    with pytest.raises(ValueError, match=r"in order and disjoint, got \(\(2, 4\), \(3, 5\)\)"):
        cached_attention(q, k, k, key_ranges=((2, 4), (3, 5)))
