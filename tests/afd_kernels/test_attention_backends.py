"""Optional attention libraries through stand-ins of their documented interfaces, in float64, with their own backward.

The stand-ins check what the libraries check (layout, dtypes of the offsets, who is contiguous) and compute the
gradients by the published formulae instead of autograd. What they cannot show is the libraries' own arithmetic.
"""

import importlib.machinery
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from afd_kernels import BlockCausalLayout, block_causal_attention, block_causal_attention_backends, cached_attention
from afd_kernels.block_causal_attention import check_impl
from afd_kernels.block_causal_attention_backends import (
    DENSE_BACKENDS,
    HUB_KERNELS,
    VARLEN_BACKENDS,
    _library,
    _loads,
    best_dense_backend,
    best_varlen_backend,
    dense_backend,
    is_installed,
    varlen_backend,
)

LAYOUTS = [
    BlockCausalLayout(7, 5, 3),
    BlockCausalLayout(6, 3, 2, window_frames=3, sink_frames=1),
    BlockCausalLayout(7, 3, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True),
]


class PackedAttention(torch.autograd.Function):
    """Attention within segments of [tokens, heads, D]; backward from the saved log-sum-exp, as in the papers."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, segments: Any, scale: float) -> Any:
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, dtype=q.dtype)
        for rows, keys in segments:
            scores = scale * torch.einsum("qhd,khd->qhk", q[rows], k[keys])
            lse[rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("qhk,khd->qhd", (scores - lse[rows][..., None]).exp(), v[keys])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = (out * grads[0]).sum(-1, keepdim=True)
        for rows, keys in ctx.segments:
            p = (ctx.scale * torch.einsum("qhd,khd->qhk", q[rows], k[keys]) - lse[rows][..., None]).exp()
            ds = p * (torch.einsum("qhd,khd->qhk", grads[0][rows], v[keys]) - delta[rows])
            dq[rows] += ctx.scale * torch.einsum("qhk,khd->qhd", ds, k[keys])
            dk[keys] += ctx.scale * torch.einsum("qhk,qhd->khd", ds, q[rows])
            dv[keys] += torch.einsum("qhk,qhd->khd", p, grads[0][rows])
        return dq, dk, dv, None, None


def packed(q, k, v, starts_q, starts_k, longest_q, longest_k, scale):
    for x in (q, k, v):
        assert x.ndim == 3
        assert x.stride(-1) == 1
        assert x.shape[1:] == q.shape[1:]
    for starts, x, longest in ((starts_q, q, longest_q), (starts_k, k, longest_k)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert starts[0] == 0
        assert starts[-1] == len(x)
        assert type(longest) is int
        assert starts.diff().max() == longest
        assert starts.diff().min() > 0
    edges = [[slice(a, b) for a, b in zip(s[:-1].tolist(), s[1:].tolist(), strict=True)] for s in (starts_q, starts_k)]
    segments = list(zip(*edges, strict=True))
    return PackedAttention.apply(q, k, v, segments, q.shape[-1] ** -0.5 if scale is None else scale)


def dense(q, k, v, scale):
    """[B, N, heads, D], packed as FlashAttention does."""
    assert q.ndim == k.ndim == v.ndim == 4
    starts_q, starts_k = (torch.arange(0, len(x) * x.shape[1] + 1, x.shape[1], dtype=torch.int32) for x in (q, k))
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return packed(flat_q, flat_k, flat_v, starts_q, starts_k, q.shape[1], k.shape[1], scale).view_as(q)


SPLITS: list[int] = []


# The leading parameters of flash-attn 2.8 and of the `hopper` interface; the rest have defaults that are left alone.
def flash2_dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert (dropout_p, causal) == (0.0, False)
    return dense(q, k, v, softmax_scale)


def flash2_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
):  # fmt: skip
    assert (dropout_p, causal, window_size) == (0.0, False, (-1, -1))
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)


def flash3_dense(q, k, v, softmax_scale=None, causal=False, num_splits=1):
    assert causal is False
    SPLITS.append(num_splits)
    return dense(q, k, v, softmax_scale), torch.zeros(())


def flash3_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    seqused_q=None, seqused_k=None, softmax_scale=None, causal=False,
):  # fmt: skip
    assert (seqused_q, seqused_k, causal) == (None, None, False)
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale), torch.zeros(())


def torch_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, -1)
    return packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    made.__spec__ = importlib.machinery.ModuleSpec(name, SimpleNamespace(), origin="stand-in")  # type: ignore[arg-type]
    return made


def forget_what_is_installed() -> None:
    for cached in (is_installed, _library, _loads, dense_backend, varlen_backend):
        cached.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Every optional library there is, as a stand-in that takes float64."""

    built = {
        HUB_KERNELS["hub3"]: SimpleNamespace(flash_attn_func=flash3_dense, flash_attn_varlen_func=flash3_varlen),
        HUB_KERNELS["hub2"]: SimpleNamespace(flash_attn_func=flash2_dense, flash_attn_varlen_func=flash2_varlen),
    }

    def get_kernel(repo_id: str, *, version: int) -> SimpleNamespace:
        return built[repo_id, version]

    members = {
        "flash_attn": {"flash_attn_func": flash2_dense, "flash_attn_varlen_func": flash2_varlen},
        "flash_attn_interface": {"flash_attn_func": flash3_dense, "flash_attn_varlen_func": flash3_varlen},
        "kernels": {"get_kernel": get_kernel},
        "torch.nn.attention.varlen": {"varlen_attn": torch_varlen},
    }
    for name, functions in members.items():
        monkeypatch.setitem(sys.modules, name, module(name, **functions))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(block_causal_attention_backends, "FLASH_DTYPES", (torch.float64,))
    forget_what_is_installed()
    yield
    forget_what_is_installed()


@pytest.fixture
def bare(monkeypatch):
    """None of them."""
    for name in ("flash_attn", "flash_attn_interface", "kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    forget_what_is_installed()
    yield
    forget_what_is_installed()


def with_grads(layout, impl, scale):
    generator = torch.Generator().manual_seed(0)
    shape = (2, layout.num_tokens, 3, 8)
    *inputs, upstream = (torch.randn(shape, generator=generator).double().transpose(1, 2) for _ in range(4))
    for x in inputs:
        x.requires_grad_()
    out = block_causal_attention(inputs[0], inputs[1], inputs[2], layout, impl=impl, scale=scale)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, inputs, upstream)), strict=True))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.2])
def test_every_library_gives_the_reference_with_gradients(layout, scale):
    expected = with_grads(layout, "reference", scale)
    dense = [f"chunks:{backend}" for backend in ("flash3", "flash2", "hub3", "hub2")]
    impls = [*dense, *(f"varlen:{backend}" for backend in VARLEN_BACKENDS)]
    for impl in [*impls, "varlen"]:
        for name, got in with_grads(layout, impl, scale).items():
            torch.testing.assert_close(
                got, expected[name], rtol=1e-10, atol=1e-12, msg=lambda text, at=(impl, name): f"{at}: {text}"
            )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("impl", ["flash3", "flash2", "hub3", "hub2"])
def test_cached_attention_calls_every_library(impl):
    q, k, v = (torch.randn(2, 3, rows, 8, dtype=torch.float64) for rows in (4, 9, 9))
    ranges = ((0, 2), (5, 9))
    expected = cached_attention(q, k, v, impl="reference", key_ranges=ranges)
    torch.testing.assert_close(cached_attention(q, k, v, impl=impl, key_ranges=ranges), expected)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("impl", ["flash3", "hub3"])
@pytest.mark.parametrize(("queries", "expected"), [(1560, 3), (4680, 1)])
def test_version_3_is_told_to_split_the_keys_where_queries_are_few(monkeypatch, impl, queries, expected):
    monkeypatch.setattr(block_causal_attention_backends, "processors", lambda device: 132)
    SPLITS.clear()
    q, k = (torch.zeros(1, 12, rows, 1, dtype=torch.float64) for rows in (queries, 1024))
    cached_attention(q, k, k, impl=impl)
    assert [expected] == SPLITS


@pytest.mark.usefixtures("installed")
def test_the_best_installed_library_is_chosen():
    assert best_dense_backend(torch.device("cuda"), torch.float64) == "flash3"  # what these stand-ins take
    assert best_dense_backend(torch.device("cuda"), torch.float32) == "sdpa"
    assert best_dense_backend(torch.device("cpu"), torch.float64) == "sdpa"
    assert best_varlen_backend() == "flash3"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "impl", ["chunks:flash2", "chunks:flash3", "chunks:hub3", "varlen:flash2", "varlen:torch", "varlen:hub2"]
)
def test_libraries_for_half_precision_refuse_the_rest(impl):
    layout = LAYOUTS[0]
    x = torch.zeros(1, 2, layout.num_tokens, 8)
    with pytest.raises(ValueError, match=rf"'{impl.split(':')[1]}' takes .*, got torch.float32"):
        block_causal_attention(x, x, x, layout, impl=impl)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("impl", "how"),
    [
        ("chunks:flash2", r"pip install -e '\.\[cuda\]'"),
        ("chunks:flash3", "build FlashAttention's `hopper` folder"),
        ("chunks:hub3", r"pip install -e '\.\[hub\]'"),
        ("varlen:hub2", r"pip install -e '\.\[hub\]'"),
        ("chunks:cudnn", "use a CUDA build of torch with cuDNN"),
        ("varlen:flash2", r"pip install -e '\.\[cuda\]'"),
        ("varlen:flash3", "build FlashAttention's `hopper` folder"),
        ("varlen:torch", "use a CUDA build of torch"),
        ("varlen", r"needs a varlen kernel; to install one: pip install -e '\.\[cuda\]'"),
    ],
)
def test_what_is_not_installed_says_how_to_install_it(impl, how):
    layout = LAYOUTS[0]
    x = torch.zeros(1, 2, layout.num_tokens, 8)
    with pytest.raises(ImportError, match=how):
        block_causal_attention(x, x, x, layout, impl=impl)
    with pytest.raises(ValueError, match="backend must be one of"):
        dense_backend("fast")


@pytest.mark.usefixtures("bare")
def test_a_folder_named_kernels_is_not_the_package(monkeypatch):
    namespace = importlib.machinery.ModuleSpec("kernels", None, is_package=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: namespace if name == "kernels" else None)
    assert not is_installed("hub3")
    assert set(filter(is_installed, DENSE_BACKENDS)) == {"sdpa"}


@pytest.mark.usefixtures("installed")
def test_a_library_that_does_not_load_is_warned_of_and_passed_over(monkeypatch, caplog):
    def import_module(name: str) -> ModuleType:
        if name == "flash_attn_interface":
            raise OSError("undefined symbol: _ZN3c104cuda9SetDeviceEa")
        return sys.modules[name]

    monkeypatch.setattr(block_causal_attention_backends.importlib, "import_module", import_module)
    message = "attention backend 'flash3' is installed but does not load: OSError: undefined symbol: _ZN3c104"
    cuda = torch.device("cuda")
    assert best_dense_backend(cuda, torch.float64) == "flash2"
    assert best_varlen_backend() == "flash2"
    assert [record.message[: len(message)] for record in caplog.records] == [message]
    with pytest.raises(ImportError, match=message):
        check_impl("chunks:flash3", cuda, torch.float64, 64)
    check_impl("chunks:flash2", cuda, torch.float64, 64)
    check_impl("varlen", cuda, torch.float64, 64)


def test_torch_has_the_varlen_interface_that_is_called():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "scale" in names
