"""Triton NFT loss against the float64 oracle (run by ../test_lanes.py in the interpreter and on a GPU)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from afd_kernels import nft_loss
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import check_against_oracle, patch_interpreter_bf16, poison_empty_tensors

DEVICE = "cpu" if is_interpreting() else "cuda"
SHAPE = (3, 2, 5, 7, 3)  # N, C, F, H, W
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (variant, v_old given, target as pair, prior: none | weighted | unweighted, t per frame)
CASES = [
    ("plain", True, False, "none", False),
    ("plain", True, True, "weighted", True),
    ("plain", False, False, "unweighted", True),
    ("adaptive", True, True, "none", True),
    ("adaptive", True, False, "weighted", True),
    ("adaptive", False, True, "unweighted", False),
]

if is_interpreting():
    patch_interpreter_bf16()


@pytest.fixture(autouse=True)
def poison():
    restore = poison_empty_tensors()
    yield
    restore()


def draw(shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("v", "v_old", "x0", "eps", "v_ref")
    tensors = {name: torch.randn(shape, generator=generator) for name in names}
    tensors["v"].requires_grad_()
    times = torch.rand(shape[0], shape[2], generator=generator).to(DEVICE)
    times[:, 0] = 0.0
    times[:, -1] = 1.0
    return tensors, times, torch.linspace(0, 1, shape[0]).to(DEVICE)


def check(case, dtype, shape=SHAPE, times=None, w=None):
    variant, has_old, is_pair, prior, is_per_frame = case
    tensors, drawn_times, drawn_w = draw(shape)
    times = drawn_times if times is None else times
    w = drawn_w if w is None else w

    def call(v, v_old, x0, eps, v_ref, impl):
        return nft_loss(
            v,
            v_old if has_old else None,
            (x0, eps) if is_pair else eps,
            times if is_per_frame else times.mean(1),
            w,
            nft_beta=0.3,
            v_ref=v_ref if prior != "none" else None,
            prior_weight=0.0 if prior == "none" else 0.05,
            is_prior_weighted=prior == "weighted",
            variant=variant,
            impl=impl,
        )

    return check_against_oracle(call, tensors, dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_match_the_oracle(case, dtype):
    check(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 3, 5, 7, 1), (2, 4, 5, 8, 8), (1, 3, 3, 40, 41)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape_matches_the_oracle(case, shape, dtype):
    check(case, dtype, shape=shape)


@pytest.mark.parametrize("time", [0.0, 1e-4, 1.0])
def test_extreme_times_match_the_oracle(time):
    errors = check(CASES[4], torch.float32, times=torch.full((3, 5), time, device=DEVICE))
    assert all(error < 1e-5 for error in errors.values())


def test_a_row_longer_than_a_tile_matches_the_oracle():
    check(CASES[4], torch.float32, shape=(2, 1, 2, 33, 34))


@pytest.mark.parametrize("v_old_given", [True, False])
def test_gradient_at_the_old_policy_is_signed_regression(v_old_given):
    tensors, _, w = draw()
    v = tensors["v"].detach().to(DEVICE).requires_grad_()
    target = tensors["eps"].to(DEVICE)
    old = v.detach().clone() if v_old_given else None
    loss = nft_loss(v, old, target, w, w, nft_beta=0.3, variant="plain", impl="triton")
    (grad,) = torch.autograd.grad(loss.mean(), v)
    expected = 2 * 0.3 * (2 * w - 1)[:, None, None, None, None] * (v - target).detach() / v.numel()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)
    without_w = nft_loss(v, old, target, w, 1 - w, nft_beta=0.3, variant="plain", impl="triton")
    torch.testing.assert_close(loss, without_w)


def test_strided_inputs_give_the_same_loss():
    tensors, times, w = draw()
    dense = [tensors[name].detach().to(DEVICE) for name in ("v", "v_old", "eps")]
    strided = [x.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0) for x in dense]
    assert not strided[0].is_contiguous()
    losses = [nft_loss(v, old, target, times, w, nft_beta=0.3, impl="triton") for v, old, target in (dense, strided)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


@pytest.mark.parametrize("wrapper", ["compile", "checkpoint", "checkpoint_reentrant"])
def test_loss_survives_compile_and_activation_checkpointing(wrapper):
    tensors, times, w = draw()
    v, v_old, target = (tensors[name].detach().to(DEVICE) for name in ("v", "v_old", "eps"))

    def run(v):
        return nft_loss(v * 2.0, v_old, target, times, w, nft_beta=0.3, impl="triton").sum()

    v.requires_grad_()
    expected = torch.autograd.grad(run(v), v)[0]
    if wrapper == "compile":
        backend = "aot_eager" if is_interpreting() else "inductor"
        loss = torch.compile(run, backend=backend, fullgraph=True)(v)
    else:
        loss = checkpoint(run, v, use_reentrant=wrapper == "checkpoint_reentrant")
    loss.backward()
    torch.testing.assert_close(v.grad, expected, rtol=1e-6, atol=1e-9)


def test_custom_operators_pass_torch_opcheck():
    from afd_kernels.nft_loss_triton import nft_loss_forward

    tensors, times, w = draw((2, 1, 2, 2, 2))
    v, v_old, target, v_ref = (tensors[name].detach().to(DEVICE) for name in ("v", "v_old", "eps", "v_ref"))
    arguments = (v.requires_grad_(), v_old, target, None, times, w, v_ref, [0.3, 0.1, 5.0], True, True)
    torch.library.opcheck(nft_loss_forward, arguments, test_utils=("test_schema", "test_faketensor"))
