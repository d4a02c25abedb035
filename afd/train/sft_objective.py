"""Supervised fine-tuning: flow matching on the teacher's videos, in the student's own teacher-forcing layout."""

from __future__ import annotations

from torch import Tensor

from afd.config import RunConfig
from afd.distributed import World
from afd.rollout import sampler_times
from afd.train.objectives import FORWARD, Roles, StepTimer, sample_generators
from afd.train.student_step import step_student
from afd.train.student_update import make_noised_states
from afd.types import Rollout, VideoBatch


def sft_step(
    roles: Roles, teacher: VideoBatch, config: RunConfig, step: int, *, world: World, timer: StepTimer
) -> dict[str, Tensor]:
    """Minimise mean |v - (eps - x^T)|^2 once: each chunk noised by its own time, clean earlier chunks as context.

    Each of the B teacher clips is noised G times, so that a step costs what a step of the other objectives costs; take
    `rollout.group_size=1` for N different clips instead. Off-policy: the student never sees its own errors.

    Args:
        roles: the student and its averages are updated.
        teacher: this rank's B prompts with finished teacher videos.
        config: the run's; `nft.time_sampling` says how times are drawn.
        step: seeds every random choice.
        world: unused; all objectives are called alike.
        timer: receives the phase's seconds.
    Returns:
        Scalars averaged over all ranks.
    """
    group_size, engine = config.rollout.group_size, roles.student
    latents, prompts = (each.repeat_interleave(group_size, dim=0) for each in (teacher.latents, teacher.prompt_embeds))
    ids = teacher.sample_ids.repeat_interleave(group_size)
    generators = sample_generators(teacher, group_size, config.seed, FORWARD, step)
    times, shape = sampler_times(config.rollout), engine.module.shape

    def flow_matching(x_t: Tensor, t: Tensor, prompt: Tensor, clean: Tensor, v_target: Tensor):
        v = engine(x_t, t, prompt, clean=clean, context_noise=times.context_noise)
        loss = (v - v_target).float().square().mean()
        return loss, {"student/flow_error": loss}

    with timer.phase("update"):
        states = make_noised_states(
            Rollout(latents, prompts, ids, ids), generators, config.nft, times=times, shift=config.rollout.shift,
            shape=shape,
        )  # fmt: skip
        metrics = step_student(engine, (states.x_t, states.t, prompts, states.clean, states.v_target), flow_matching)
        roles.old.update(engine.global_steps)
        roles.ema.update(engine.global_steps)
    return metrics
