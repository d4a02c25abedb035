"""Distribution matching distillation: the student follows the difference of two scores, the teacher's and its own.

A closed teacher has no score. Where a model trained on its videos stands in for it (`dmd.real_score`, a student file of
any chunk length; one chunk is a bidirectional model), this is the baseline that the paper compares with.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from afd.config import RunConfig
from afd.diffusion.flow_matching import add_noise, shift_time, x0_from_velocity
from afd.distributed import World
from afd.rollout import sampler_times
from afd.train.averaging import ParameterAverage
from afd.train.engines import Engine, gathered
from afd.train.gan_objective import last_step_in_parallel, truncated
from afd.train.objectives import EXIT, FORWARD, Roles, StepTimer, roll_out, sample_generators
from afd.train.student_step import step_student
from afd.types import VideoBatch


def dmd_gradient(x0: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """Where the student's clips should not go: (x0_fake - x0_real) / mean |x0 - x0_real|, per clip.

    Args:
        x0: [N, C, F, H, W], the student's clips.
        x0_fake, x0_real: [N, C, F, H, W], both scores' estimates of x0 from the same noised clips.
    Returns:
        [N, C, F, H, W]; zero where the scores agree.
    Source: arXiv 2311.18828, eq. 7 and 8; arXiv 2405.14867.
    """
    scale = (x0 - x0_real).abs().flatten(1).mean(1).clamp_min(1e-5)
    return (x0_fake - x0_real) / scale.view(-1, 1, 1, 1, 1)


def noised(clips: Tensor, generators: list[torch.Generator], config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Clips at one random time each: x_t and eps [N, C, F, H, W], t [N, F]."""
    low, high = config.dmd.time_range
    uniforms = torch.cat([torch.rand(1, generator=g) for g in generators])
    eps = torch.stack([torch.randn(clips.shape[1:], generator=g) for g in generators]).to(clips)
    t = shift_time(low + (high - low) * uniforms, config.rollout.shift).to(clips.device)
    t = t[:, None].expand(-1, clips.shape[2]).contiguous()
    return add_noise(clips, eps, t), eps, t


@torch.no_grad()
def both_estimates(
    critic: Engine, real_score: ParameterAverage, x_t: Tensor, t: Tensor, prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """x0 [B, C, F, H, W] as the critic and as the real score, which are one module with two sets of weights, see it in
    x_t [B, C, F, H, W] at t [B, F]; collective. No rank holds more than one of them whole, and none afterwards."""
    found = []
    for weights in (nullcontext(), real_score.applied()):
        with weights, gathered(critic) as score:
            found.append(x0_from_velocity(x_t, score(x_t, t, prompt), t))
    return found[0], found[1]


def dmd_step(
    roles: Roles, teacher: VideoBatch, config: RunConfig, step: int, *, world: World, timer: StepTimer
) -> dict[str, Tensor]:
    """One critic step on the student's own clips; every `dmd.critic_steps` of them the student moves as well.

    Args:
        roles: student, critic and averages are updated.
        teacher: this rank's B prompts; their videos are not looked at.
        config: the run's; rollouts are by the current student.
        step: seeds every random choice.
        world: this process's place.
        timer: receives the phases' seconds.
    Returns:
        Scalars averaged over all ranks.
    """
    engine, critic, real_score = roles.student, roles.critic, roles.real_score
    assert critic is not None
    assert real_score is not None
    group_size = config.rollout.group_size
    times = truncated(sampler_times(config.rollout), (config.seed, EXIT, step))
    with timer.phase("rollout"):
        x_s, noise = roll_out(roles, teacher, config, step, world=world, times=times, policy="current")
    with timer.phase("critic"):
        x_t, eps, t = noised(x_s.latents, sample_generators(teacher, group_size, config.seed, FORWARD, step, 0), config)

        def flow_matching(x_t: Tensor, t: Tensor, prompt: Tensor, v_target: Tensor):
            return (critic(x_t, t, prompt) - v_target).float().square().mean(), {}

        rows = step_student(critic, (x_t, t, x_s.prompt_embeds, eps - x_s.latents), flow_matching)
    metrics = {name.replace("student/", "critic/"): value for name, value in rows.items()}
    if (step + 1) % config.dmd.critic_steps:
        return metrics
    _, eps, t = noised(x_s.latents, sample_generators(teacher, group_size, config.seed, FORWARD, step, 1), config)
    with timer.phase("update"):

        def matching(clip: Tensor, prompt: Tensor, noise: Tensor, eps: Tensor, t: Tensor):
            x0 = last_step_in_parallel(engine, clip, prompt, noise, times, engine.module.shape)
            clean = x0.detach()
            slope = dmd_gradient(clean, *both_estimates(critic, real_score, add_noise(clean, eps, t), t, prompt))
            return (x0 * slope).mean(), {"student/dmd_gradient": slope.abs().mean()}

        metrics |= step_student(engine, (x_s.latents, x_s.prompt_embeds, noise, eps, t), matching)
    roles.old.update(engine.global_steps)
    roles.ema.update(engine.global_steps)
    return metrics
