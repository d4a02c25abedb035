"""Learning-rate factors and who owns the learning rate."""

import math

import pytest

from afd.config import LRSchedule, RunConfig
from afd.config_file import ConfigError
from afd.train.learning_rate import check_lr_owner, lr_factor


def test_cosine_falls_from_one_to_the_final_scale() -> None:
    schedule = LRSchedule(kind="cosine", final_scale=0.2)
    factors = [lr_factor(schedule, step, 100) for step in range(101)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.6)
    assert factors[100] == pytest.approx(0.2)
    assert factors == sorted(factors, reverse=True)


def test_warm_up_is_linear_and_multiplies_the_cosine() -> None:
    schedule = LRSchedule(kind="cosine", warmup_steps=4)
    assert lr_factor(LRSchedule(warmup_steps=4), 0, 10) == 0.25
    assert lr_factor(LRSchedule(warmup_steps=4), 9, 10) == 1.0
    assert lr_factor(schedule, 1, 10) == pytest.approx(0.5 * (1 + math.cos(0.1 * math.pi)) / 2)


def test_schedule_in_both_files_is_refused() -> None:
    config = RunConfig.model_validate({"discriminator": {"lr_schedule": {"kind": "cosine"}}})
    check_lr_owner(config, {"scheduler": {}}, {})
    with pytest.raises(ConfigError, match=r"discriminator\.lr_schedule and 'scheduler' in the discriminator's"):
        check_lr_owner(config, {}, {"scheduler": {}})


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_scheduler_that_would_undo_the_scale_is_refused(scale: float) -> None:
    """A scheduler writes its own rate at every step: a frozen discriminator would thaw."""
    config = RunConfig.model_validate({"discriminator": {"lr_scale": scale}})
    check_lr_owner(config, {"scheduler": {}}, {})
    with pytest.raises(ConfigError, match=r"discriminator\.lr_scale and 'scheduler' in the discriminator's"):
        check_lr_owner(config, {}, {"scheduler": {}})
