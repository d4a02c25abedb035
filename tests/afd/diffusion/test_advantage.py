"""Scores to advantages to optimality weights."""

from typing import get_args

import pytest
import torch

from afd.diffusion.advantage import Baseline, Normalisation, group_advantage, normalise_advantage, optimality_weight

SCORES = torch.tensor([1.0, 3.0, 10.0, 20.0, -4.0, -6.0])  # three prompts, two rollouts each


def test_group_baseline_by_hand() -> None:
    assert group_advantage(SCORES, group_size=2).tolist() == [-1, 1, -5, 5, 1, -1]


def test_batch_baseline_by_hand() -> None:
    assert group_advantage(SCORES, group_size=2, baseline="batch").tolist() == [-3, -1, 6, 16, -8, -10]


@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_advantages_sum_to_zero_in_each_group(group_size: int) -> None:
    scores = 100 + torch.randn(5 * group_size, generator=torch.Generator().manual_seed(group_size), dtype=torch.float64)
    advantage = group_advantage(scores, group_size=group_size)
    assert advantage.view(5, group_size).sum(1).abs().max() < 1e-12


def test_a_prompts_own_level_does_not_matter() -> None:
    shifted = SCORES + torch.tensor([100.0, 100, -7, -7, 0, 0])
    assert torch.equal(group_advantage(shifted, group_size=2), group_advantage(SCORES, group_size=2))


@pytest.mark.parametrize("shape", [(5,), (2, 2), ()])
def test_scores_must_fill_the_groups(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"scores must be \[N\] with N a multiple of group_size = 2, got"):
        group_advantage(torch.zeros(shape), group_size=2)


def test_group_baseline_of_one_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline 'group' needs group_size > 1"):
        group_advantage(SCORES, group_size=1)
    assert group_advantage(SCORES, group_size=1, baseline="batch").sum() == 0


def test_global_std_by_hand() -> None:
    advantage = torch.tensor([-1.0, 1, -3, 3])
    scaled = normalise_advantage(advantage, group_size=2, by="global_std", eps=0.0)
    assert scaled.tolist() == pytest.approx([value / 5**0.5 for value in (-1, 1, -3, 3)])


def test_group_std_gives_every_group_unit_size() -> None:
    advantage = torch.tensor([-1.0, 1, -3, 3])
    scaled = normalise_advantage(advantage, group_size=2, by="group_std", eps=0.0)
    assert scaled.tolist() == pytest.approx([-1, 1, -1, 1])


def test_minmax_maps_the_steps_range_onto_plus_minus_one() -> None:
    advantage = torch.tensor([-1.0, 0, 1, 3])
    scaled = normalise_advantage(advantage, group_size=2, by="minmax", eps=0.0)
    assert scaled.tolist() == pytest.approx([-1, -0.5, 0, 1])


@pytest.mark.parametrize("by", get_args(Normalisation))
def test_equal_scores_give_no_preference(by: Normalisation) -> None:
    advantage = group_advantage(torch.full((6,), 2.0), group_size=3)
    weight = optimality_weight(normalise_advantage(advantage, group_size=3, by=by), clip=5.0)
    assert weight.tolist() == [0.5] * 6


@pytest.mark.parametrize("by", get_args(Normalisation))
@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_lie_in_the_unit_interval_and_keep_the_order(
    baseline: Baseline, by: Normalisation, scale: float
) -> None:
    scores = scale * torch.randn(12, generator=torch.Generator().manual_seed(1))
    advantage = group_advantage(scores, group_size=4, baseline=baseline)
    weight = optimality_weight(normalise_advantage(advantage, group_size=4, by=by), clip=0.7)
    assert weight.min() >= 0
    assert weight.max() <= 1
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        ordered = weight[rows][advantage[rows].argsort()]
        assert (ordered.diff() >= 0).all()


def test_weight_saturates_at_the_clip() -> None:
    advantage = torch.tensor([-9.0, -5, -2.5, 0, 2.5, 5, 9])
    assert optimality_weight(advantage, clip=5.0).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_clip_must_be_positive(clip: float) -> None:
    with pytest.raises(ValueError, match=f"clip must be > 0, got {clip}"):
        optimality_weight(torch.zeros(2), clip=clip)
