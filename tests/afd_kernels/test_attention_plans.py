"""Tile shapes and variants per device: what a device can run, and what asking for anything else says."""

import pytest
import torch

from afd_kernels.attention_plans import Tiles, check_variant, choose_plan, compute_capability, variants_of


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (75, ()),
        (80, ("pointer",)),
        (89, ("pointer",)),
        (90, ("tma", "specialized", "pointer")),
        (100, ("tma", "pointer")),
        (120, ("tma", "pointer")),
    ],
)
def test_descriptors_need_hopper_and_only_hopper_splits_warps(capability, expected):
    assert variants_of(capability) == expected


def test_the_preferred_variant_is_the_first_that_a_device_can_run():
    assert check_variant(None, 86) == "pointer"
    assert check_variant(None, 90) == "tma"
    assert check_variant("specialized", 90) == "specialized"


@pytest.mark.parametrize(
    ("variant", "capability", "message"),
    [
        ("fast", 90, "the triton variant must be one of tma, specialized, pointer, got 'fast'"),
        ("tma", 89, "the triton variant must be one of pointer for compute capability 8.9, got 'tma'"),
        ("specialized", 100, "must be one of tma, pointer for compute capability 10.0, got 'specialized'"),
        (None, 75, "impl='triton' needs compute capability 8.0 or newer, got 7.5"),
    ],
)
def test_what_a_device_cannot_run_is_an_error(variant, capability, message):
    with pytest.raises(ValueError, match=message):
        check_variant(variant, capability)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_every_device_has_tiles_for_every_head_dimension_and_dtype(head_dim, dtype, capability):
    for variant in variants_of(capability):
        plan = choose_plan(head_dim, dtype, variant, capability)
        tiles = (plan.forward, plan.key_value_grad, plan.query_grad, plan.cached)
        is_large = dtype == torch.float16 and head_dim >= 64
        assert all(tile.tma == (is_large and variant != "pointer") for tile in tiles)
        assert [tile.specialize for tile in tiles] == [is_large and variant == "specialized", False, False, False]


def test_hopper_keeps_the_tiles_that_were_checked_for_it():
    plan = choose_plan(128, torch.bfloat16, None, 90)
    assert plan.forward == Tiles(128, 128, 8, 2, tma=True)
    assert plan.key_value_grad == Tiles(64, 128, 8, 2, tma=True)
    assert choose_plan(128, torch.bfloat16, "specialized", 90).forward.num_warps == 4


def test_a_cpu_stands_for_hopper():
    assert compute_capability(torch.device("cpu")) == 90
