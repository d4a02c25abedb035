"""Configuration to live objects: the one place where sections are taken apart for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from afd.config import AveragesSection, RunConfig, configured_shape
from afd.distributed import World
from afd.models.encoders import VideoCodec
from afd.models.lora import add_lora, add_old_adapter, old_adapter_name
from afd.models.student import CausalBlock, CausalStudent
from afd.models.weights import fill_student, load_student, open_student
from afd.train.averaging import Decay, ParameterAverage, decay_after_75, decay_ramp_to_half
from afd.train.discriminator_view import latent_view
from afd.train.discriminators import build_discriminator, build_view
from afd.train.ds_config import DSConfig, load_ds_config
from afd.train.engines import Engine, build_engine, build_sharded, write_shard
from afd.train.objectives import Roles
from afd.train.preflight import RunPlan
from afd.train.replay import RolloutReplay


def build_roles(
    config: RunConfig, plan: RunPlan, ds_student: DSConfig, ds_discriminator: DSConfig, *, world: World,
    codec: VideoCodec | None = None,
) -> Roles:  # fmt: skip
    """The engines and the three averages of a run; collective. No discriminator where the objective never asks it.

    `codec` is one that is loaded already, for what a VLM discriminator is shown; None loads another there.
    """
    student = build_student(config, plan, ds_student)
    discriminator = None
    if config.has_discriminator:
        discriminator = build_discriminator(config, plan, world, ds_config=ds_discriminator)
    return roles_around(student, discriminator, config, ds_student, ds_discriminator, world=world, codec=codec)


def roles_around(
    student: CausalStudent, discriminator: nn.Module | None, config: RunConfig, ds_student: DSConfig,
    ds_discriminator: DSConfig, *, world: World, codec: VideoCodec | None = None,
) -> Roles:  # fmt: skip
    """The same around models that are in memory, the student as `train_ready` leaves it; collective."""
    student = student.to(world.device)
    student_engine = build_engine(student, ds_student, leaf_modules=(CausalBlock,))
    averages = config.averages
    critic, real_score = _build_scores(config, world=world)
    judge, view = None, latent_view
    if discriminator is not None:
        view = build_view(config, world, codec=codec)
        judge = build_engine(discriminator, ds_discriminator, leaf_modules=_student_blocks(discriminator))
    return Roles(
        critic=critic,
        real_score=real_score,
        view=view,
        student=student_engine,
        discriminator=judge,
        old=ParameterAverage(
            student_engine,
            decay=_old_policy_decay(averages),
            name="old",
            twin=old_adapter_name if config.has_old_adapter else None,
        ),
        ema=ParameterAverage(student_engine, decay=averages.ema_decay, name="ema"),
        reference=ParameterAverage(student_engine, decay=1.0, name="reference"),
        replay=RolloutReplay(num_steps=config.discriminator.replay_steps, share=config.discriminator.replay_share),
    )


def _student_blocks(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The student's block, where a module has one: ZeRO-3 gathers it as a whole."""
    return (CausalBlock,) if any(isinstance(each, CausalBlock) for each in module.modules()) else ()


def _build_scores(config: RunConfig, *, world: World) -> tuple[Engine | None, ParameterAverage | None]:
    """The critic's engine and the frozen real score of objective dmd: the weights that the critic starts from.

    The critic recomputes its blocks where the student does.
    """
    if config.objective != "dmd" or config.dmd.real_score is None:
        return None, None
    ds_critic = load_ds_config(config.dmd.ds_config)
    critic = _load_for(ds_critic, config.dmd.real_score, {}).to(world.device)
    critic.gradient_checkpointing = config.student.gradient_checkpointing
    engine = build_engine(critic, ds_critic, leaf_modules=(CausalBlock,))
    return engine, ParameterAverage(engine, decay=1.0, name="real score")


def build_student(config: RunConfig, plan: RunPlan, ds_student: DSConfig) -> CausalStudent:
    """The initial student as it is trained: with adapters when LoRA is asked for, the old policy's beside them."""
    return train_ready(_load_for(ds_student, plan.student_path, config.student.model_dump()), config)


def _load_for(ds_config: DSConfig, path: Path, given: dict[str, Any]) -> CausalStudent:
    """A student's file of any format as the module of an engine.

    Under ZeRO-3 each rank holds its shard of every parameter from the start, and reads one tensor at a time: no rank
    ever holds the model.
    """
    if ds_config.get("zero_optimization", {}).get("stage") != 3:
        return load_student(path, config=given)
    file = open_student(path, given)
    student = build_sharded(lambda: CausalStudent(file.shape), ds_config)
    fill_student(student, file.source, write_shard)
    return student


def train_ready(student: CausalStudent, config: RunConfig) -> CausalStudent:
    """Give a bare student everything its training needs; in place."""
    prepare_student(student, config)
    if config.has_old_adapter:
        lora = config.student.lora
        with torch.random.fork_rng(devices=[]):
            add_old_adapter(student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return student


def prepare_student(student: CausalStudent, config: RunConfig) -> CausalStudent:
    """Give a student what the run's configuration asks for beyond its weights; in place."""
    student.shape = configured_shape(student.shape, config.student)
    lora = config.student.lora
    if lora.rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            add_lora(student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    student.gradient_checkpointing = config.student.gradient_checkpointing
    student.rollout_compile = config.rollout.compile
    return student


def _old_policy_decay(section: AveragesSection) -> Decay:
    """The old policy's decay or schedule."""
    return {
        "constant": section.old_policy_decay,
        "slow": decay_ramp_to_half,
        "delayed": decay_after_75,
    }[section.old_policy]
