"""One optimizer step of the discriminator: prompt-paired Bradley-Terry on teacher videos against rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.config import DiscriminatorSection
from afd.diffusion.losses import bradley_terry_loss
from afd.distributed import all_reduce_mean
from afd.train.engines import Engine
from afd.types import Rollout, VideoBatch


def update_discriminator(
    engine: Engine,
    teacher: VideoBatch,
    rollout: Rollout,
    section: DiscriminatorSection,
    generators: list[torch.Generator],
) -> dict[str, Tensor]:
    """Train D on every (teacher video, rollout) pair of a prompt, once.

    Args:
        engine: the discriminator's; its micro batch times accumulation is this rank's number of rollouts N.
        teacher: B prompts with their teacher videos.
        rollout: N = B G rollouts, the G of a prompt in consecutive rows.
        section: temperature, label smoothing, input noise.
        generators: one per row, for the input noise.
    Returns:
        `discriminator/loss`, `/accuracy` (share of pairs ranked right, ties one half), `/margin` (mean teacher score
        minus student score): scalars averaged over all ranks.
    """
    group_size = rollout.latents.shape[0] // teacher.latents.shape[0]
    real = teacher.latents.repeat_interleave(group_size, dim=0)  # [N, C, F, H, W]
    fake = rollout.latents
    if section.input_noise > 0:
        noise = torch.stack([torch.randn((2, *fake.shape[1:]), generator=g) for g in generators]).to(fake)
        real, fake = real + section.input_noise * noise[:, 0], fake + section.input_noise * noise[:, 1]
    micro = engine.train_micro_batch_size_per_gpu()
    totals = torch.zeros(3, device=fake.device)
    for start in range(0, fake.shape[0], micro):
        rows = slice(start, start + micro)
        prompt = rollout.prompt_embeds[rows]
        scores = engine(torch.cat([real[rows], fake[rows]]), torch.cat([prompt, prompt]))
        teacher_scores, student_scores = scores.chunk(2)
        loss = bradley_terry_loss(
            teacher_scores, student_scores, temperature=section.temperature, label_smoothing=section.label_smoothing
        )
        engine.backward(loss)
        engine.step()
        margin = (teacher_scores - student_scores).detach()
        accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
        totals += torch.stack([loss.detach(), accuracy.mean(), margin.mean()]) * (margin.numel() / fake.shape[0])
    names = ("discriminator/loss", "discriminator/accuracy", "discriminator/margin")
    return dict(zip(names, all_reduce_mean(totals), strict=True))


@torch.no_grad()
def score(engine: Engine, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Scores D(x, y) [N] of clips [N, C, F, H, W], in the engine's micro batches, without gradient."""
    micro = 2 * engine.train_micro_batch_size_per_gpu()
    parts = zip(latents.split(micro), prompt_embeds.split(micro), strict=True)
    return torch.cat([engine(part, prompt) for part, prompt in parts])
