"""Triton split-KV attention against the float64 oracle (run by ../test_lanes.py, interpreter and GPU)."""

import pytest
import torch

from afd_kernels import cached_attention
from afd_kernels.cached_attention_triton import cached_attention_triton
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import assert_close_to_oracle, patch_interpreter_bf16, poison_empty_tensors

DEVICE = "cpu" if is_interpreting() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if is_interpreting():
    patch_interpreter_bf16()


@pytest.fixture(autouse=True)
def poison():
    restore = poison_empty_tensors()
    yield
    restore()


def draw(queries, keys, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 3, head_dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    k, v = (torch.randn(2, 3, keys, head_dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize("ranges", [None, ((0, 37), (90, 171))], ids=str)
def test_output_matches_the_oracle(ranges, splits, dtype):
    q, k, v = draw(50, 171, 16, dtype)
    actual = cached_attention_triton(q, k, v, ranges or ((0, 171),), splits=splits)
    eager = cached_attention(q, k, v, impl="sdpa", key_ranges=ranges)
    oracle = cached_attention(q.double(), k.double(), v.double(), impl="reference", key_ranges=ranges)
    assert_close_to_oracle("out", actual, eager, oracle)


def test_shipped_tiles_read_a_cache_in_place_with_descriptors():
    q, k, v = draw(60, 300, 128, torch.bfloat16)
    ranges = ((0, 60), (180, 300))
    unseen = torch.ones(300, dtype=torch.bool, device=DEVICE)
    for start, end in ranges:
        unseen[start:end] = False
    actual = cached_attention(q, k, v, impl="triton", key_ranges=ranges)
    oracle = cached_attention(q.double(), k.double(), v.double(), impl="reference", key_ranges=ranges)
    assert_close_to_oracle("out", actual, actual, oracle)
    k[:, :, unseen], v[:, :, unseen] = 100.0, -100.0
    assert torch.equal(cached_attention(q, k, v, impl="triton", key_ranges=ranges), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_a_step_never_waits_for_the_device(impl):
    q, k, v = draw(60, 300, 128, torch.bfloat16)
    ranges = ((0, 60), (180, 300))
    with torch.no_grad():
        first = cached_attention(q, k, v, impl=impl, key_ranges=ranges)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = cached_attention(q, k, v, impl=impl, key_ranges=ranges)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def test_gradients_and_a_third_range_are_errors():
    q, k, v = draw(4, 64, 16, torch.float32)
    with pytest.raises(ValueError, match="takes one or two key ranges, got 3"):
        cached_attention(q, k, v, impl="triton", key_ranges=((0, 1), (2, 3), (4, 5)))
    with pytest.raises(ValueError, match="has no backward"):
        cached_attention(q.requires_grad_(), k, v, impl="triton")
