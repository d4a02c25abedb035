"""Learning rates over a run: factors on what DeepSpeed's JSON says, functions of the step alone: resume is exact."""

from __future__ import annotations

import math

from afd.config import LRSchedule, RunConfig
from afd.config_file import ConfigError
from afd.train.ds_config import DSConfig
from afd.train.engines import Engine


def lr_factor(schedule: LRSchedule, step: int, num_steps: int) -> float:
    """The factor on the learning rate of a step.

    Args:
        schedule: kind, warm-up and final value.
        step: student steps done before this one, in [0, num_steps).
        num_steps: of the run.
    Returns:
        In [0, 1]: `min(1, (step + 1) / warmup_steps)` times 1, or times
        `final + (1 - final) (1 + cos(pi step / num_steps)) / 2`.
    """
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.kind == "cosine":
        fall = (1 + math.cos(math.pi * step / num_steps)) / 2
        factor *= schedule.final_scale + (1 - schedule.final_scale) * fall
    return factor


def set_lr(engine: Engine, factor: float) -> None:
    """Give every parameter group the JSON's learning rate times a factor."""
    lr = engine.optimizer_params()["lr"] * factor
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def check_lr_owner(config: RunConfig, ds_student: DSConfig, ds_discriminator: DSConfig) -> None:
    """One owner of each learning rate.

    Raises:
        ConfigError: a schedule or a scale in the YAML and a scheduler in the JSON.
    """
    student, discriminator = config.student, config.discriminator
    for name, is_ours, ds_config in (
        ("student.lr_schedule", student.lr_schedule != LRSchedule(), ds_student),
        ("discriminator.lr_schedule", discriminator.lr_schedule != LRSchedule(), ds_discriminator),
        ("discriminator.lr_scale", discriminator.lr_scale != 1.0, ds_discriminator),
    ):
        if is_ours and "scheduler" in ds_config:
            raise ConfigError(
                f"{name} and 'scheduler' in the {name.partition('.')[0]}'s DeepSpeed JSON both set the learning rate: "
                "keep one"
            )
