"""Triton RMSNorm + RoPE against the float64 oracle (run by ../test_lanes.py in the interpreter and on a GPU)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from afd_kernels import rope_3d_table, rope_qk_norm
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import check_against_oracle, patch_interpreter_bf16, poison_empty_tensors

DEVICE = "cpu" if is_interpreting() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if is_interpreting():
    patch_interpreter_bf16()


@pytest.fixture(autouse=True)
def poison():
    restore = poison_empty_tensors()
    yield
    restore()


def draw(batch, num_heads, head_dim, grid, frame_offset=0):
    generator = torch.Generator().manual_seed(0)
    frames, height, columns = grid
    width, tokens = num_heads * head_dim, frames * height * columns
    inputs = {
        "q": torch.randn(batch, tokens, width, generator=generator, requires_grad=True),
        "k": 3 * torch.randn(batch, tokens, width, generator=generator),
        "q_weight": torch.randn(width, generator=generator, requires_grad=True),
        "k_weight": torch.rand(width, generator=generator, requires_grad=True),
    }
    inputs["k"].requires_grad_()
    return inputs, rope_3d_table(
        frames, height, columns, head_dim, frame_offset=frame_offset, dtype=torch.float64, device=DEVICE
    )


def check(dtype, batch, num_heads, head_dim, grid, frame_offset=0):
    inputs, table = draw(batch, num_heads, head_dim, grid, frame_offset)

    def call(q, k, q_weight, k_weight, impl):
        cos, sin = (x.to(torch.float64 if q.dtype == torch.float64 else torch.float32) for x in table)
        return rope_qk_norm(q, k, q_weight, k_weight, cos, sin, num_heads=num_heads, impl=impl)

    return check_against_oracle(call, inputs, dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "num_heads", "head_dim", "grid", "frame_offset"),
    [(1, 3, 10, (5, 1, 1), 0), (2, 2, 16, (2, 1, 3), 20), (1, 3, 128, (1, 1, 3), 3)],
)
def test_outputs_and_gradients_match_the_oracle(batch, num_heads, head_dim, grid, frame_offset, dtype):
    check(dtype, batch, num_heads, head_dim, grid, frame_offset)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (4, 24), (12, 128), (5, 64)])
@pytest.mark.parametrize("grid", [(5, 7, 1), (1, 1, 1), (3, 2, 5)], ids=str)
def test_every_shape_matches_the_oracle(num_heads, head_dim, grid, dtype):
    check(dtype, 2, num_heads, head_dim, grid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_go_straight_into_the_cache(dtype):
    num_heads, head_dim, grid = 2, 6, (1, 2, 3)
    inputs, table = draw(2, num_heads, head_dim, grid)
    q, k, q_weight, k_weight = (value.detach().to(DEVICE, dtype) for value in inputs.values())
    cos, sin = (x.float() for x in table)
    cache = torch.full((2, num_heads, 20, head_dim), 7.0, device=DEVICE, dtype=dtype)
    slot = cache[:, :, 5:11]

    def run(k_out):
        return rope_qk_norm(q, k, q_weight, k_weight, cos, sin, num_heads=num_heads, k_out=k_out, impl="triton")

    cached_q, cached_k = run(slot)
    expected_q, expected_k = run(None)
    assert cached_k.data_ptr() == slot.data_ptr()
    assert torch.equal(cached_q, expected_q)
    assert torch.equal(cache[:, :, 5:11], expected_k)
    assert bool((cache[:, :, :5] == 7).all())
    assert bool((cache[:, :, 11:] == 7).all())


def test_strided_inputs_and_gradients_match_dense_ones():
    inputs, table = draw(2, 2, 6, (1, 2, 3))
    cos, sin = (x.float() for x in table)
    q, k, q_weight, k_weight = (value.detach().to(DEVICE) for value in inputs.values())
    fused = torch.cat([q, k], dim=-1).requires_grad_()

    def run(q, k):
        q, k = rope_qk_norm(q, k, q_weight, k_weight, cos, sin, num_heads=2, impl="triton")
        return (q.transpose(1, 2) * k.transpose(1, 2)).flatten().cumsum(0).sum()

    (grad,) = torch.autograd.grad(run(fused[..., :12], fused[..., 12:]), fused)
    q.requires_grad_()
    k.requires_grad_()
    expected = torch.cat(torch.autograd.grad(run(q, k), (q, k)), dim=-1)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrapper", ["compile", "checkpoint", "checkpoint_reentrant"])
def test_gradients_survive_compile_and_activation_checkpointing(wrapper):
    inputs, table = draw(1, 2, 6, (1, 2, 2))
    cos, sin = (x.float() for x in table)
    q, k, q_weight, k_weight = (value.detach().to(DEVICE) for value in inputs.values())

    def run(q, q_weight):
        a, b = rope_qk_norm(q, k, q_weight, k_weight, cos, sin, num_heads=2, impl="triton")
        return (a * b).sum()

    q.requires_grad_()
    q_weight.requires_grad_()
    expected = torch.autograd.grad(run(q, q_weight), (q, q_weight))
    if wrapper == "compile":
        backend = "aot_eager" if is_interpreting() else "inductor"
        total = torch.compile(run, backend=backend, fullgraph=True)(q, q_weight)
    else:
        total = checkpoint(run, q, q_weight, use_reentrant=wrapper == "checkpoint_reentrant")
    total.backward()
    torch.testing.assert_close(q.grad, expected[0])
    torch.testing.assert_close(q_weight.grad, expected[1])
