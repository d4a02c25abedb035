"""Triton block-causal attention against the float64 oracle (run by ../test_lanes.py, interpreter and GPU)."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from afd_kernels import BlockCausalLayout, block_causal_attention
from afd_kernels.attention_plans import Plan, Tiles, choose_plan, compute_capability, variants_of
from afd_kernels.block_causal_attention_reference import block_causal_attention_reference
from afd_kernels.block_causal_attention_triton import block_causal_attention_triton
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import (
    ERROR_CAPS,
    TORCH_ERROR_FACTOR,
    patch_interpreter_bf16,
    poison_empty_tensors,
    relative_error,
)

DEVICE = "cpu" if is_interpreting() else "cuda"
VARIANTS = variants_of(compute_capability(torch.device(DEVICE)))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = BlockCausalLayout(5, 20, 1)
WINDOW = BlockCausalLayout(5, 13, 1, window_frames=2, sink_frames=1)
TEACHER = BlockCausalLayout(5, 9, 2, teacher_forcing=True)
EVERYTHING = BlockCausalLayout(
    7, 7, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True
)  # three key ranges, and a window that opens inside a chunk
RAGGED = BlockCausalLayout(5, 60, 1)
SMALL = Tiles(32, 16, 4, 1)
UNEVEN = Plan(SMALL, Tiles(16, 32, 4, 1), SMALL, SMALL)
DESCRIPTORS = Plan(*[Tiles(32, 16, 4, 1, tma=True)] * 4)
SPECIALIZED = Plan(
    Tiles(32, 32, 4, 1, tma=True, specialize=True), Tiles(16, 16, 4, 1), Tiles(32, 32, 4, 1, tma=True), SMALL
)  # fmt: skip

if is_interpreting():
    patch_interpreter_bf16()


@pytest.fixture(autouse=True)
def poison():
    restore = poison_empty_tensors()
    yield
    restore()


def draw(layout, head_dim, dtype, batch=1, heads=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, layout.num_tokens, heads, head_dim)
    q, k, v, upstream = (torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], upstream


def with_grads(call, inputs, upstream):
    out = call(*inputs)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, inputs, upstream)), strict=True))


def rms_error(actual, oracle):
    return ((actual.double() - oracle).square().mean() / oracle.square().mean()).sqrt().item()


def check(layout, head_dim, dtype, plan=None, batch=1, heads=2):
    inputs, upstream = draw(layout, head_dim, dtype, batch, heads)
    actual = with_grads(lambda q, k, v: block_causal_attention_triton(q, k, v, layout, plan=plan), inputs, upstream)
    mask = layout.dense_mask(DEVICE)
    eager = with_grads(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), inputs, upstream)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    oracle = with_grads(lambda q, k, v: block_causal_attention_reference(q, k, v, layout), wide, upstream.double())
    for name, value in actual.items():
        assert value.dtype == dtype
        # Root mean squares first: the largest of few hundred errors is noise, its ratio to torch's even more so.
        error, torch_error = rms_error(value, oracle[name]), rms_error(eager[name], oracle[name])
        limit = min(ERROR_CAPS[dtype], TORCH_ERROR_FACTOR * torch_error)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g} (torch {torch_error:.3g})"
        largest, torch_largest = relative_error(value, oracle[name]), relative_error(eager[name], oracle[name])
        limit = max(ERROR_CAPS[dtype], TORCH_ERROR_FACTOR * torch_largest)
        assert largest <= limit, f"{name}: largest {largest:.3g} > {limit:.3g} (torch {torch_largest:.3g})"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "head_dim", "plan"),
    [
        (PLAIN, 32, UNEVEN),
        (WINDOW, 16, UNEVEN),
        (TEACHER, 16, DESCRIPTORS),
        (EVERYTHING, 16, UNEVEN),
        (EVERYTHING, 32, SPECIALIZED),
    ],
)
def test_output_and_gradients_match_the_oracle(layout, head_dim, plan, dtype):
    if dtype == torch.float32 and plan is SPECIALIZED:
        pytest.skip("the specialized forward is for half precision")
    check(layout, head_dim, dtype, plan)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_shipped_tiles_match_the_oracle_on_ragged_chunks(head_dim):
    check(RAGGED, head_dim, torch.bfloat16, heads=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("layout", [RAGGED, BlockCausalLayout(6, 61, 3, teacher_forcing=True), EVERYTHING], ids=str)
def test_every_shape_matches_the_oracle(layout, head_dim, dtype):
    check(layout, head_dim, dtype, batch=2)


@pytest.mark.parametrize(("capability", "variant"), [(80, "pointer"), (100, "tma"), (120, "tma"), (120, "pointer")])
def test_tiles_of_other_devices_match_the_oracle(capability, variant):
    plan = choose_plan(128, torch.bfloat16, variant, capability)
    check(BlockCausalLayout(6, 61, 3, teacher_forcing=True), 128, torch.bfloat16, plan, heads=1)


@pytest.mark.parametrize("layout", [WINDOW, EVERYTHING], ids=str)
def test_agrees_with_eager_flex_attention(layout):
    (q, k, v), _ = draw(layout, 16, torch.float32)
    q, k, v = (x.detach().contiguous() for x in (q, k, v))
    expected = flex_attention(q, k, v, block_mask=layout.block_mask(DEVICE))
    actual = block_causal_attention(q, k, v, layout, impl="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("is_aligned", [True, False])
def test_any_batch_and_head_strides(is_aligned):
    layout, width = WINDOW, 3 * 2 * 16 + (0 if is_aligned else 3)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, layout.num_tokens, width, generator=generator).to(DEVICE)
    q, k, v = (packed[..., i * 32 : (i + 1) * 32].unflatten(-1, (2, 16)).transpose(1, 2) for i in range(3))
    inputs = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
    upstream = torch.ones((), device=DEVICE).expand(q.shape)  # stride 0, as from sum()
    actual = with_grads(
        lambda q, k, v: block_causal_attention_triton(q, k, v, layout, plan=DESCRIPTORS), inputs, upstream
    )
    expected = with_grads(lambda q, k, v: block_causal_attention_reference(q, k, v, layout), inputs, upstream)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_scale_and_activation_checkpointing():
    inputs, upstream = draw(WINDOW, 16, torch.float32)

    def run(q, k, v):
        return block_causal_attention(q, k, v, WINDOW, impl="triton", scale=0.3)

    actual = with_grads(lambda *x: checkpoint(run, *x, use_reentrant=False), inputs, upstream)
    expected = with_grads(
        lambda q, k, v: block_causal_attention_reference(q, k, v, WINDOW, scale=0.3), inputs, upstream
    )
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_later_chunks_change_no_earlier_output():
    (q, k, v), _ = draw(PLAIN, 16, torch.float32)
    with torch.no_grad():
        before = block_causal_attention(q, k, v, PLAIN, impl="triton")
        for x in (q, k, v):
            x[:, :, 60:] += 1
        after = block_causal_attention(q, k, v, PLAIN, impl="triton")
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


def test_what_the_kernels_cannot_take_is_an_error():
    layout = BlockCausalLayout(2, 3, 1)

    def call(head_dim=16, dtype=torch.float32, **options):
        q = torch.zeros(1, 1, 6, head_dim, dtype=dtype, device=DEVICE)
        return block_causal_attention(q, q, q, layout, **{"impl": "triton", **options})

    with pytest.raises(ValueError, match=r"takes head dimensions \(16, 32, 64, 128\), got 24"):
        call(head_dim=24)
    with pytest.raises(ValueError, match=r"takes float16, bfloat16 or float32, got torch.float64"):
        call(dtype=torch.float64)
    with pytest.raises(ValueError, match="takes a positive scale, got -1"):
        call(scale=-1)
    with pytest.raises(ValueError, match="variant must be one of tma, specialized, pointer, got 'x'"):
        call(impl="triton:x")


WAN = BlockCausalLayout(21, 1560, 3, teacher_forcing=True)


def draw_wan(heads=12):
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    shape = (1, heads, WAN.num_tokens, 128)
    return [torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_wan_shapes_match_the_chunk_loop_and_repeat_exactly(variant):
    q, k, v, upstream = draw_wan(heads=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    runs = [
        with_grads(lambda q, k, v: block_causal_attention(q, k, v, WAN, impl=f"triton:{variant}"), inputs, upstream)
        for _ in range(2)
    ]
    expected = with_grads(lambda q, k, v: block_causal_attention(q, k, v, WAN, impl="chunks:sdpa"), inputs, upstream)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
        worst = (value.double() - expected[name].double()).abs().max() / expected[name].double().abs().max()
        assert worst < 1.2e-2, (name, float(worst))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_launches_do_not_hang(variant):
    layout = BlockCausalLayout(6, 100, 2, teacher_forcing=True)
    inputs, upstream = draw(layout, 128, torch.bfloat16)
    for _ in range(1000):
        with_grads(lambda q, k, v: block_causal_attention(q, k, v, layout, impl=f"triton:{variant}"), inputs, upstream)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_memory_is_linear_in_the_sequence():
    q, k, v, upstream = draw_wan(heads=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_grads(lambda q, k, v: block_causal_attention(q, k, v, WAN, impl="triton"), inputs, upstream)
    # out, dq, dk, dv and the two rows of statistics, with a little room for work tables and descriptors
    assert torch.cuda.max_memory_allocated() - before < 5 * q.numel() * q.element_size() + 2**24
