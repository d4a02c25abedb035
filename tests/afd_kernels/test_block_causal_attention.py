"""Block-causal attention on the CPU: every path against the float64 reference; choice and errors."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from afd_kernels import BlockCausalLayout, block_causal_attention
from afd_kernels.attention_defaults import _LOGGED
from afd_kernels.block_causal_attention import _default, parse_impl
from afd_kernels.block_causal_attention_flex import compiled_flex_attention
from afd_kernels.block_causal_attention_reference import dense_attention_reference
from afd_kernels.block_causal_attention_varlen import block_causal_attention_varlen

LAYOUTS = [
    BlockCausalLayout(5, 6, 1),
    BlockCausalLayout(7, 5, 3),
    BlockCausalLayout(6, 3, 2, window_frames=3, sink_frames=1),
    BlockCausalLayout(5, 4, 2, teacher_forcing=True),
    BlockCausalLayout(7, 3, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True),
]


def draw(layout, dtype=torch.float64, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shape = (2, layout.num_tokens, 3, head_dim)
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def with_grads(call, layout, dtype=torch.float64):
    inputs, upstream = draw(layout, dtype)
    out = call(*inputs)
    return out, *torch.autograd.grad(out, inputs, upstream)


def packed_double(q, k, v, starts_q, starts_k, longest_q, longest_k, scale):
    """Stands in for a varlen kernel: [tokens, heads, D], one dense attention per segment."""
    assert (starts_q.dtype, starts_k.dtype) == (torch.int32, torch.int32)
    assert (starts_q[-1], starts_k[-1]) == (len(q), len(k))
    assert (starts_q.diff().max(), starts_k.diff().max()) == (longest_q, longest_k)
    parts = [
        dense_attention_reference(*(x[None, a:b].transpose(1, 2) for x, a, b in spans), scale=scale).transpose(1, 2)[0]
        for q0, q1, k0, k1 in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
        for spans in [((q, q0, q1), (k, k0, k1), (v, k0, k1))]
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.2])
def test_chunks_and_varlen_match_the_reference_with_gradients(layout, scale):
    expected = with_grads(
        lambda q, k, v: block_causal_attention(q, k, v, layout, impl="reference", scale=scale), layout
    )
    chunks = with_grads(lambda q, k, v: block_causal_attention(q, k, v, layout, impl="chunks", scale=scale), layout)
    varlen = with_grads(
        lambda q, k, v: block_causal_attention_varlen(q, k, v, layout, attend=packed_double, scale=scale), layout
    )
    for got in (chunks, varlen):
        for actual, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reference_is_masked_softmax(layout):
    (q, k, v), _ = draw(layout)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask())
    torch.testing.assert_close(block_causal_attention(q, k, v, layout, impl="reference"), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_flex_matches_the_reference(layout):
    (q, k, v), _ = draw(layout, torch.float32, head_dim=16)
    with torch.no_grad():
        q, k, v = (x.contiguous() for x in (q, k, v))
        actual = block_causal_attention(q, k, v, layout, impl="flex")
        torch.testing.assert_close(actual, block_causal_attention(q, k, v, layout, impl="reference"))
    q, k, v = draw(layout)[0]
    with pytest.raises(ValueError, match="impl='flex' has no backward on CPU"):
        block_causal_attention(q, k, v, layout, impl="flex")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling FlexAttention on a CPU needs g++")
def test_compiled_flex_matches_the_reference():
    """The compiled path with its BlockMask, as on CUDA; PyTorch has no CPU backward of it."""
    layout = LAYOUTS[-1]
    (q, k, v), _ = draw(layout, torch.float32, head_dim=16)
    with torch.no_grad():
        q, k, v = (x.contiguous() for x in (q, k, v))
        actual = compiled_flex_attention()(q, k, v, block_mask=layout.block_mask("cpu"))
        torch.testing.assert_close(actual, block_causal_attention(q, k, v, layout, impl="reference"))


def test_bf16_key_gradients_are_summed_over_chunks_in_float32():
    layout = BlockCausalLayout(12, 4, 1)
    exact = with_grads(lambda q, k, v: block_causal_attention(q, k, v, layout, impl="reference"), layout)
    actual = with_grads(lambda q, k, v: block_causal_attention(q, k, v, layout, impl="chunks"), layout, torch.bfloat16)
    for got, wanted in zip(actual, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("impl", ["reference", "chunks"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_changing_a_later_chunk_changes_no_earlier_output(layout, impl):
    (q, k, v), _ = draw(layout)
    start = layout.chunk_spans[-1][0] * layout.tokens_per_frame
    with torch.no_grad():
        before = block_causal_attention(q, k, v, layout, impl=impl)
        later = torch.zeros(layout.num_tokens, dtype=torch.bool)
        later[start : layout.video_tokens] = True
        if layout.teacher_forcing:
            later[layout.video_tokens + start :] = True
        for x in (q, k, v):
            x[:, :, later] += 1
        after = block_causal_attention(q, k, v, layout, impl=impl)
    assert torch.equal(before[:, :, ~later], after[:, :, ~later])
    assert not torch.isclose(before[:, :, later], after[:, :, later]).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_chunks_survive_activation_checkpointing(use_reentrant):
    layout = LAYOUTS[-1]
    expected = with_grads(lambda q, k, v: block_causal_attention(q, k, v, layout, impl="reference"), layout)
    inputs, upstream = draw(layout)
    out = checkpoint(
        lambda q, k, v: block_causal_attention(q, k, v, layout, impl="chunks"), *inputs, use_reentrant=use_reentrant
    )
    out.backward(upstream)
    for got, wanted in zip((out, *(x.grad for x in inputs)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_chunks_refuse_a_second_backward():
    layout = BlockCausalLayout(3, 2, 1, teacher_forcing=True)
    q, k, v = draw(layout, head_dim=2)[0]
    out = block_causal_attention(q, k, v, layout, impl="chunks").sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph is not supported"):
        out.backward()


def test_the_default_is_the_fastest_measured_and_logged_once(caplog):
    _LOGGED.clear()
    _default.cache_clear()
    layout = LAYOUTS[0]
    with caplog.at_level("INFO"), torch.no_grad():
        q, k, v = (x.float() for x in draw(layout)[0])
        outs = [block_causal_attention(q, k, v, layout) for _ in range(3)]
    assert [record.message for record in caplog.records] == [
        "block_causal_attention runs impl=chunks:sdpa on cpu (fastest of those measured on cpu that can run here)"
    ]
    torch.testing.assert_close(outs[0], block_causal_attention(q, k, v, layout, impl="reference"))


def test_every_name_of_an_implementation_is_known_before_it_runs():
    assert parse_impl("flex") == ("flex", "")
    assert parse_impl("chunks:flash3") == ("chunks", "flash3")
    with pytest.raises(ValueError, match="the triton variant must be one of tma, specialized, pointer, got 'fast'"):
        parse_impl("triton:fast")
    with pytest.raises(
        ValueError, match="the varlen backend must be one of flash3, flash2, torch, hub3, hub2, got 'sdpa'"
    ):
        parse_impl("varlen:sdpa")


def test_wrong_inputs_are_named():
    layout = BlockCausalLayout(2, 3, 1)
    x = torch.zeros(1, 2, 6, 4)
    with pytest.raises(ValueError, match=r"q must be \[B, heads, 6, D\] for this layout, got \[1, 2, 5, 4\]"):
        block_causal_attention(x[:, :, :5], x, x, layout)
    with pytest.raises(ValueError, match=r"k must have q's shape \[1, 2, 6, 4\], got \[1, 1, 6, 4\]"):
        block_causal_attention(x, x[:, :1], x, layout)
    with pytest.raises(ValueError, match=r"v must be torch.float32 on cpu like q, got torch.float64"):
        block_causal_attention(x, x, x.double(), layout)
    with pytest.raises(ValueError, match=r"q must be floating point, got torch.int64"):
        block_causal_attention(x.long(), x.long(), x.long(), layout)
    with pytest.raises(ValueError, match=r"impl must be one of reference, triton, chunks, varlen, flex, got 'magic'"):
        block_causal_attention(x, x, x, layout, impl="magic")
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'flex:fast'"):
        block_causal_attention(x, x, x, layout, impl="flex:fast")
    with pytest.raises(ValueError, match=r"backend must be one of flash3, flash2, sdpa, cudnn, hub3, hub2, got 'fast'"):
        block_causal_attention(x, x, x, layout, impl="chunks:fast")


@pytest.mark.slow
def test_importing_attention_does_not_import_triton():
    modules = "block_causal_attention, block_causal_attention_triton, cached_attention, cached_attention_triton, layout"
    code = f"import sys; from afd_kernels import {modules}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
