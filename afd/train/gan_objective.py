"""The GAN objective: the discriminator's gradient through the last denoising step of the student's own rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from afd.config import DiscriminatorSection, RunConfig, StudentShape
from afd.diffusion.flow_matching import add_noise, x0_from_velocity
from afd.diffusion.losses import bradley_terry_loss, non_saturating_loss
from afd.distributed import World, seeded_generator
from afd.models.clip_windows import draw_windows
from afd.rollout import SamplerTimes, chunk_spans, sampler_times
from afd.train.engines import bare_module, gathered
from afd.train.objectives import DISCRIMINATOR, EXIT, Roles, StepTimer, roll_out, sample_generators, train_discriminator
from afd.train.student_step import step_student
from afd.types import VideoBatch


def truncated(times: SamplerTimes, seed: tuple[int, ...]) -> SamplerTimes:
    """The sampler stopped after a random number of its steps, the same for every chunk, row and rank.

    A first chunk with steps of its own stops after a random number of those.
    Source: Self-Forcing, arXiv 2506.08009, algorithm 1 (gradient through the last denoising step alone).
    """
    generator = seeded_generator(*seed)

    def cut(grid: tuple[float, ...]) -> tuple[float, ...]:
        return grid[: int(torch.randint(len(grid), (1,), generator=generator)) + 1]

    first = times.first_chunk_times
    return dataclasses.replace(times, times=cut(times.times), first_chunk_times=cut(first) if first else None)


def last_step_in_parallel(
    velocity: Callable[..., Tensor], x0: Tensor, prompt: Tensor, noise: Tensor, times: SamplerTimes, shape: StudentShape
) -> Tensor:
    """The rollout's x0 again, all chunks at once, with the gradient of its last denoising step.

    In the teacher-forcing layout a chunk sees the clean chunks before it just as the cached rollout did, so repeating
    the denoising steps from the rollout's own noise gives the rollout's own clips. All chunks take their last step in
    the same, last pass; one with fewer steps waits for it.

    Args:
        velocity: the student's forward, `(x_t, t, prompt, clean=, context_noise=)`.
        x0: [N, C, F, H, W], what the rollout made; no gradient.
        prompt: [N, L, D].
        noise: [N, S, C, F, H, W], what the rollout was made from.
        times: the rollout's.
        shape: the student's; tells the chunks.
    Returns:
        x0 [N, C, F, H, W], equal to the argument up to rounding.
    """
    spans = chunk_spans(shape, x0.shape[2])
    grids = [times.of_chunk(index) for index in range(len(spans))]
    lengths = torch.tensor([end - start for start, end in spans])
    most = max(len(grid) for grid in grids)
    ones = torch.ones(x0.shape[0], x0.shape[2], device=x0.device, dtype=torch.promote_types(x0.dtype, torch.float32))

    def at(step: int) -> Tensor:  # [N, F], each chunk's own time
        own = [grid[max(step - (most - len(grid)), 0)] for grid in grids]
        return torch.tensor(own, dtype=torch.float64).repeat_interleave(lengths).to(ones) * ones

    context = times.context_noise
    clean = add_noise(x0, noise[:, times.num_noises - 1], context * ones) if context else x0
    x_t, made = noise[:, 0], x0
    for step in range(most):
        t, is_last = at(step), step + 1 == most
        with torch.set_grad_enabled(is_last):
            made = x0_from_velocity(x_t, velocity(x_t, t, prompt, clean=clean, context_noise=context), t)
        if not is_last:
            after, parts = at(step + 1), []
            for (start, end), grid in zip(spans, grids, strict=True):
                frames, done = slice(start, end), step - (most - len(grid)) + 1  # steps this chunk has done
                if done > 0:
                    parts.append(add_noise(made[:, :, frames], noise[:, done, :, frames], after[:, frames]))
                else:
                    parts.append(x_t[:, :, frames])
            x_t = torch.cat(parts, dim=2)
    return made


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """No gradient for a module's parameters: a gradient *through* it must not reach its engine's reduction."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def generator_loss(teacher_scores: Tensor, student_scores: Tensor, section: DiscriminatorSection) -> Tensor:
    """What the student minimises: to be preferred to the teacher's clip (Bradley-Terry), or to be taken for real."""
    if section.loss == "gan":
        return non_saturating_loss(student_scores)
    return bradley_terry_loss(student_scores, teacher_scores, temperature=section.temperature)


def gan_step(
    roles: Roles, teacher: VideoBatch, config: RunConfig, step: int, *, world: World, timer: StepTimer
) -> dict[str, Tensor]:
    """One step of adversarial training: roll out, train D, follow D's gradient at the student's clips.

    Args:
        roles: student, discriminator and averages are updated.
        teacher: this rank's B prompts with finished teacher videos.
        config: the run's; rollouts are by the current student.
        step: seeds every random choice.
        world: this process's place.
        timer: receives the phases' seconds.
    Returns:
        Scalars averaged over all ranks.
    """
    group_size, section, engine = config.rollout.group_size, config.discriminator, roles.student
    judge = roles.discriminator
    assert judge is not None
    times = truncated(sampler_times(config.rollout), (config.seed, EXIT, step))
    with timer.phase("rollout"):
        x_s, noise = roll_out(roles, teacher, config, step, world=world, times=times, policy="current")
    with timer.phase("discriminator"):
        metrics = train_discriminator(roles, teacher, x_s, config, step, num_updates=section.steps_per_student_step)
    real = teacher.latents.repeat_interleave(group_size, dim=0)
    generators = sample_generators(teacher, group_size, config.seed, DISCRIMINATOR, step, -1)
    blur = torch.stack([torch.randn((2, *real.shape[1:]), generator=g) for g in generators]).to(real)
    windows = draw_windows(bare_module(judge), real, generators)

    with timer.phase("update"), gathered(judge) as module, frozen(module) as discriminator:

        def adversarial(
            clip: Tensor, prompt: Tensor, eps: Tensor, teacher_clip: Tensor, shift: Tensor, *windows: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            x0 = last_step_in_parallel(engine, clip, prompt, eps, times, engine.module.shape)
            seen = x0.detach().requires_grad_()
            shift = section.input_noise * shift
            teacher_scores = discriminator(teacher_clip + shift[:, 0], prompt, *windows)
            student_scores = discriminator(seen + shift[:, 1], prompt, *windows)
            loss = generator_loss(teacher_scores, student_scores, section)
            (slope,) = torch.autograd.grad(loss, seen)
            surrogate = (x0 * slope).sum()  # its gradient in the student's weights is the loss's
            return surrogate - surrogate.detach() + loss.detach(), {"rollout/score_mean": student_scores.mean()}

        inputs = (x_s.latents, x_s.prompt_embeds, noise, real, blur, *windows)
        metrics |= step_student(engine, inputs, adversarial)
    roles.old.update(engine.global_steps)
    roles.ema.update(engine.global_steps)
    return metrics
