"""The training objectives: one function per method, each reading like its paper's algorithm box."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.config import RunConfig
from afd.diffusion.advantage import group_advantage, normalise_advantage, optimality_weight
from afd.distributed import World, gather_cat, seeded_generator
from afd.models.lora import merged_adapters
from afd.rollout import SamplerTimes, last_step_noise, rollout, rollout_noise, sampler_times
from afd.train.averaging import ParameterAverage
from afd.train.discriminator_update import score, update_discriminator
from afd.train.discriminator_view import DiscriminatorView, latent_view, show
from afd.train.engines import Engine, gathered, is_gathered_copy
from afd.train.replay import RolloutReplay
from afd.train.student_update import make_noised_states, update_student, velocities_of
from afd.types import NoisedStates, Rollout, VideoBatch

_HISTOGRAM_BINS = 10
ROLLOUT, DISCRIMINATOR, FORWARD, EVALUATION, REPLAY, EXIT = range(6)  # seed streams: no two uses share random numbers


@dataclass(frozen=True)
class Roles:
    """Everything that learns, lags or remembers: the engines, three averages of the student, earlier rollouts."""

    student: Engine
    old: ParameterAverage
    ema: ParameterAverage
    reference: ParameterAverage
    replay: RolloutReplay
    discriminator: Engine | None = None
    """None where the objective never asks it."""
    critic: Engine | None = None
    """The fake score of objective dmd: a velocity model of the student's own clips."""
    real_score: ParameterAverage | None = None
    """The real score of objective dmd, a frozen velocity model of the teacher's videos: the critic's first weights."""
    view: DiscriminatorView = latent_view
    """What the discriminator is shown of a clip and its prompt."""


class StepTimer:
    """Wall time of the phases of a step, seconds, as `time/<phase>_s`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the enclosed time to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"time/{name}_s"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


def sample_generators(batch: VideoBatch, group_size: int, *keys: int) -> list[torch.Generator]:
    """One generator per rollout, from (keys, sample id, g): the same on any number of ranks."""
    return [seeded_generator(*keys, *key) for key in batch.seed_keys(group_size)]


def roll_out(
    roles: Roles, batch: VideoBatch, config: RunConfig, step: int, *, world: World, times: SamplerTimes | None = None,
    policy: str | None = None,
) -> tuple[Rollout, Tensor]:  # fmt: skip
    """x^S: G student samples per prompt, parameters gathered once, no gradient; and the noise they were made from.

    Args:
        roles: the student and its averages.
        batch: this rank's B prompts.
        config: the run's.
        step: seeds the noise.
        world: this process's place.
        times: when to denoise; default the configured.
        policy: "current" or "ema"; default the configured.
    Returns:
        The rollouts, and noise [N, S, C, F, H, W] as `rollout` reads it.
    """
    group_size = config.rollout.group_size
    times = times or sampler_times(config.rollout)
    keys = [(config.seed, ROLLOUT, step, *key) for key in batch.seed_keys(group_size)]
    noise = rollout_noise(keys, times.num_noises, batch.latents.shape[1:]).to(batch.latents)
    embeds = batch.prompt_embeds.repeat_interleave(group_size, dim=0)
    batch_size = config.rollout.batch_size or roles.student.train_micro_batch_size_per_gpu()
    with ExitStack() as stack:
        if (policy or config.rollout.policy) == "ema":
            stack.enter_context(roles.old.applied())
        student = stack.enter_context(gathered(roles.student))
        if config.rollout.merge_adapters:
            stack.enter_context(merged_adapters(student, is_disposable=is_gathered_copy))
        parts = zip(embeds.split(batch_size), noise.split(batch_size), strict=True)
        latents = torch.cat([rollout(student, prompt, eps, times) for prompt, eps in parts])
    count = len(batch.sample_ids)
    group_ids = torch.arange(world.rank * count, (world.rank + 1) * count).repeat_interleave(group_size)
    is_coupled = config.nft.noise_coupling > 0
    own = last_step_noise(noise, times, roles.student.module.shape) if is_coupled else None
    return Rollout(latents, embeds, group_ids, batch.sample_ids.repeat_interleave(group_size), own), noise


def weigh(scores: Tensor, config: RunConfig, *, world: World) -> tuple[Tensor, dict[str, Tensor]]:
    """Optimality weights [N] of this rank's rollouts from the scores of all ranks, and their statistics."""
    nft, group_size = config.nft, config.rollout.group_size
    every = gather_cat(scores)  # [N x ranks], so that group, batch and global statistics mean what they say
    advantage = group_advantage(every, group_size=group_size, baseline=nft.baseline)
    normal = normalise_advantage(advantage, group_size=group_size, by=nft.normalise_by)
    clip = 1.0 if nft.normalise_by == "minmax" else nft.advantage_clip
    weight = optimality_weight(normal, clip=clip)
    metrics = {"rollout/score_mean": every.mean(), "rollout/score_std": every.std(correction=0)}
    if group_size > 1:  # one rollout alone never has a spread
        spread = every.view(-1, group_size).std(dim=1, correction=0)
        metrics["rollout/zero_std_share"] = (spread < 1e-6).float().mean()
    metrics |= {
        "weight/mean": weight.mean(),
        "weight/std": weight.std(correction=0),
        "weight/min": weight.min(),
        "weight/max": weight.max(),
        "weight/saturated_share": (normal.abs() >= clip).float().mean(),
    }
    histogram = torch.histc(weight, bins=_HISTOGRAM_BINS, min=0.0, max=1.0) / weight.numel()
    metrics |= {f"weight/hist_{i}": share for i, share in enumerate(histogram)}
    start = world.rank * scores.numel()
    return weight[start : start + scores.numel()], metrics


def train_discriminator(
    roles: Roles, teacher: VideoBatch, rollout: Rollout, config: RunConfig, step: int, *, num_updates: int
) -> dict[str, Tensor]:
    """Updates on a step's clips as the discriminator's view shows them, each with its own noise and replayed pairs."""
    assert roles.discriminator is not None
    metrics: dict[str, Tensor] = {}
    for repeat in range(num_updates):
        generators = sample_generators(teacher, config.rollout.group_size, config.seed, DISCRIMINATOR, step, repeat)
        pairs = roles.replay.mix(teacher, rollout, seed=(config.seed, REPLAY, step, repeat))
        metrics = update_discriminator(roles.discriminator, *pairs, config.discriminator, generators)
    roles.replay.remember(teacher, rollout)
    return metrics


def warmup_step(
    roles: Roles, teacher: VideoBatch, config: RunConfig, step: int, *, world: World, timer: StepTimer
) -> dict[str, Tensor]:
    """Discriminator only: the student does not move until D has something to say."""
    with timer.phase("rollout"):
        x_s, _ = roll_out(roles, teacher, config, step, world=world)
    with timer.phase("discriminator"):
        seen = show(roles.view, teacher, x_s)
        return train_discriminator(roles, *seen, config, step, num_updates=config.discriminator.warmup_updates)


def lagging_velocities(
    roles: Roles, states: NoisedStates, prompt_embeds: Tensor, config: RunConfig
) -> tuple[Tensor | None, Tensor | None, tuple[str, ...]]:
    """v_old and v_ref [N, C, F, H, W] where the objective needs them, or the roles to compute beside v instead.

    Three ways, the same numbers: `three_passes` gathers every block for each role and micro batch; `one_gather` with
    adapters lets all roles through a block while its one frozen copy is whole; `one_gather` with full fine-tuning,
    where the roles have different weights, gathers each role once for all micro batches.
    """
    gathers_once = config.nft.velocities == "one_gather"
    needed = {"old": roles.old} if config.rollout.policy == "ema" else {}
    needed |= {"reference": roles.reference} if config.nft.prior_weight > 0 else {}
    if gathers_once and config.student.lora.rank:
        return None, None, tuple(needed)
    velocities = {
        role: velocities_of(roles.student, average, states, prompt_embeds, gathers_once=gathers_once)
        for role, average in needed.items()
    }
    return velocities.get("old"), velocities.get("reference"), ()


def afd_step(
    roles: Roles, teacher: VideoBatch, config: RunConfig, step: int, *, world: World, timer: StepTimer
) -> dict[str, Tensor]:
    """One step of Adversarial Flow Distillation (arXiv 2605.26105); numbers as in the README's algorithm box.

    Args:
        roles: engines and averages; all are updated.
        teacher: this rank's B prompts y with finished teacher videos x^T (1).
        config: the run's.
        step: counts all steps, warm-up included; seeds every random choice.
        world: this process's place.
        timer: receives the phases' seconds.
    Returns:
        Scalars averaged over all ranks.
    """
    nft, group_size, discriminator = config.nft, config.rollout.group_size, roles.discriminator
    assert discriminator is not None
    with timer.phase("rollout"):
        x_s, _ = roll_out(roles, teacher, config, step, world=world)  # (2)
    with timer.phase("discriminator"):
        seen = show(roles.view, teacher, x_s)
        num_updates = config.discriminator.steps_per_student_step
        metrics = train_discriminator(roles, *seen, config, step, num_updates=num_updates)  # (3)
    with timer.phase("score"):
        scores = score(discriminator, seen[1].latents, seen[1].prompt_embeds)
        w, weight_metrics = weigh(scores, config, world=world)  # (4)
    times, shape = sampler_times(config.rollout), roles.student.module.shape
    with timer.phase("update"):
        for repeat in range(nft.updates_per_rollout):
            generators = sample_generators(teacher, group_size, config.seed, FORWARD, step, repeat)
            states = make_noised_states(
                x_s, generators, nft, times=times, shift=config.rollout.shift, shape=shape
            )  # (5)
            v_old, v_ref, beside = lagging_velocities(roles, states, x_s.prompt_embeds, config)
            metrics |= update_student(
                roles.student, states, x_s.prompt_embeds, w, nft, v_old=v_old, v_ref=v_ref, beside=beside
            )  # (6), (7)
            roles.old.update(roles.student.global_steps)
            roles.ema.update(roles.student.global_steps)
    return metrics | weight_metrics
