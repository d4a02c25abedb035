"""What a step does, read off the configuration, against the trainer's own choices."""

from fractions import Fraction
from pathlib import Path

import pytest

from afd.config_file import load_config
from afd.planning.passes import StepPasses, step_passes
from afd.rollout import sampler_times
from afd.train.gan_objective import truncated

CHUNK_WISE = Path(__file__).parents[3] / "configs" / "chunk_wise.yaml"


def passes(*overrides: str) -> StepPasses:
    return step_passes(load_config(CHUNK_WISE, overrides))


def test_afd_alone_scores_and_follows_lagging_roles() -> None:
    afd = passes("objective=afd", "nft.updates_per_rollout=2")
    assert (afd.lagging, afd.judges, afd.repeats, afd.updates, afd.lengths) == (2, True, 0, 2, [(2, 2)])
    assert afd.longest == afd
    for objective in ("sft", "gan", "dmd"):
        other = passes(f"objective={objective}", "nft.updates_per_rollout=2", "rollout.policy=ema")
        assert (other.lagging, other.judges, other.updates) == (0, False, 1)


def test_only_sft_rolls_nothing_out_and_only_gan_trains_a_discriminator_beside_afd() -> None:
    found = {name: passes(f"objective={name}") for name in ("afd", "sft", "gan", "dmd")}
    assert [name for name, each in found.items() if each.num_times == 0] == ["sft"]
    assert [name for name, each in found.items() if each.discriminator_steps] == ["afd", "gan"]
    assert {name: each.guide for name, each in found.items() if each.guide} == {"gan": "discriminator", "dmd": "scores"}


@pytest.mark.parametrize("own", ["null", "[1000, 750, 500, 250]"])
def test_rollouts_end_where_the_trainer_ends_them(own: str) -> None:
    overrides = ["objective=gan", "rollout.steps=[1000, 500, 250]", f"rollout.first_chunk_steps={own}"]
    config = load_config(CHUNK_WISE, overrides)
    drawn = (truncated(sampler_times(config.rollout), (seed,)) for seed in range(300))
    seen = {(len(each.of_chunk(0)), len(each.times)) for each in drawn}
    assert seen == set(step_passes(config).lengths)


def test_the_mean_step_and_the_longest() -> None:
    dmd = passes("objective=dmd", "dmd.critic_steps=5", "rollout.steps=[1000, 750, 500, 250]")
    assert (dmd.repeats, dmd.update_share) == (Fraction(3, 2), Fraction(1, 5))
    assert (dmd.longest.repeats, dmd.longest.update_share, dmd.longest.lengths) == (3, 1, [(4, 4)])
    own = passes("objective=gan", "rollout.steps=[1000, 500]", "rollout.first_chunk_steps=[1000]")
    assert own.repeats == Fraction(1 + 2, 2) - 1
