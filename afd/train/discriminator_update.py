"""One optimizer step of the discriminator on teacher videos against rollouts, paired by prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.config import DiscriminatorSection
from afd.diffusion.losses import bradley_terry_loss, gan_discriminator_loss
from afd.distributed import all_reduce_mean
from afd.models.clip_windows import draw_windows
from afd.train.engines import Engine, bare_module
from afd.train.student_step import engine_facts
from afd.types import Rollout, VideoBatch


@dataclass(frozen=True)
class _Pairs:
    """What D is trained on: row-paired clips of N prompts.

    Attributes:
        real, fake: [N, ...] clips as the discriminator's view shows them, input noise added.
        nearby: teacher clips a little off, for the smoothness penalty; None without it.
        prompt: [N, ...] conditions.
        windows: of a discriminator that scores windows, their first frames [N, num_clips]; all clips of a row share
            them. Else empty.
    """

    real: Tensor
    fake: Tensor
    nearby: Tensor | None
    prompt: Tensor
    windows: tuple[Tensor, ...] = ()

    def micro_batches(self, size: int) -> Iterator[_Pairs]:
        """Consecutive rows, `size` at a time."""
        for start in range(0, len(self.real), size):
            rows = slice(start, start + size)
            nearby = None if self.nearby is None else self.nearby[rows]
            windows = tuple(each[rows] for each in self.windows)
            yield _Pairs(self.real[rows], self.fake[rows], nearby, self.prompt[rows], windows)

    def scores(self, engine: Engine) -> list[Tensor]:
        """Scores [N] of real, fake and, with the penalty, nearby, in one forward."""
        clips = [self.real, self.fake, *(() if self.nearby is None else (self.nearby,))]
        beside = [torch.cat([each] * len(clips)) for each in (self.prompt, *self.windows)]
        return list(engine(torch.cat(clips), *beside).chunk(len(clips)))


def _make_pairs(
    engine: Engine,
    teacher: VideoBatch,
    rollout: Rollout,
    section: DiscriminatorSection,
    generators: list[torch.Generator],
) -> _Pairs:
    group_size = rollout.latents.shape[0] // teacher.latents.shape[0]
    real, fake = teacher.latents.repeat_interleave(group_size, dim=0), rollout.latents
    if section.input_noise > 0:
        noise = torch.stack([torch.randn((2, *fake.shape[1:]), generator=g) for g in generators]).to(fake)
        real, fake = real + section.input_noise * noise[:, 0], fake + section.input_noise * noise[:, 1]
    nearby = None
    if section.r1_weight > 0:
        shift = torch.stack([torch.randn(fake.shape[1:], generator=g) for g in generators]).to(fake)
        nearby = real + section.r1_sigma * shift
    windows = draw_windows(bare_module(engine), fake, generators)
    return _Pairs(real, fake, nearby, rollout.prompt_embeds, windows)


def update_discriminator(
    engine: Engine,
    teacher: VideoBatch,
    rollout: Rollout,
    section: DiscriminatorSection,
    generators: list[torch.Generator],
) -> dict[str, Tensor]:
    """Train D on every (teacher video, rollout) pair of a prompt, once, unless it is held back.

    Args:
        engine: the discriminator's; its micro batch times accumulation is this rank's number of rollouts N.
        teacher: B prompts with their teacher videos, as the discriminator's view shows them.
        rollout: N = B G rollouts, the same, the G of a prompt in consecutive rows.
        section: temperature, label smoothing, input noise, smoothness penalty, hold_above.
        generators: one per row, for the noises and windows.
    Returns:
        `discriminator/loss` (without the penalty), `/accuracy` (share of pairs ranked right, ties one half),
        `/margin` (mean teacher score minus student score), `/calibration` (mean predicted probability
        sigmoid(margin / temperature) minus accuracy; > 0 is overconfident), `/penalty` and `/held` (1 where no update
        was made): scalars averaged over all ranks; `/grad_norm` before clipping, `/lr`, `/skipped_steps`.
    """
    pairs = _make_pairs(engine, teacher, rollout, section, generators)
    micro = engine.train_micro_batch_size_per_gpu()
    is_held = _is_held(engine, pairs, section)
    totals = torch.zeros(5, device=pairs.fake.device)
    for part in pairs.micro_batches(micro):
        with torch.set_grad_enabled(not is_held):
            teacher_scores, student_scores, *nearby_scores = part.scores(engine)
            loss = _ranking_loss(teacher_scores, student_scores, section)
            penalty = torch.zeros_like(loss)
            for scores in nearby_scores:
                penalty = (scores - teacher_scores).square().mean() / section.r1_sigma**2
        if not is_held:
            engine.backward(loss + section.r1_weight * penalty)
            engine.step()
        margin = (teacher_scores - student_scores).detach()
        accuracy = _accuracy(margin)
        confidence = torch.sigmoid(margin / section.temperature).mean()
        values = (loss.detach(), accuracy, margin.mean(), confidence - accuracy, penalty.detach())
        totals += torch.stack(values) * (margin.numel() / len(pairs.fake))
    names = [f"discriminator/{name}" for name in ("loss", "accuracy", "margin", "calibration", "penalty")]
    metrics = dict(zip(names, all_reduce_mean(totals), strict=True))
    held = {"discriminator/held": torch.tensor(float(is_held), device=totals.device)}
    return metrics | held | engine_facts(engine, totals.device, role="discriminator")


def _ranking_loss(teacher_scores: Tensor, student_scores: Tensor, section: DiscriminatorSection) -> Tensor:
    smoothing = section.label_smoothing
    if section.loss == "gan":
        return gan_discriminator_loss(teacher_scores, student_scores, label_smoothing=smoothing)
    return bradley_terry_loss(
        teacher_scores, student_scores, temperature=section.temperature, label_smoothing=smoothing
    )


def _accuracy(margin: Tensor) -> Tensor:
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean()


@torch.no_grad()
def _is_held(engine: Engine, pairs: _Pairs, section: DiscriminatorSection) -> bool:
    """Whether D ranks more of these pairs right than it should before it learns from them; the same on all ranks."""
    if section.hold_above >= 1.0:
        return False
    margins = []
    for part in pairs.micro_batches(engine.train_micro_batch_size_per_gpu()):
        teacher_scores, student_scores, *_ = part.scores(engine)
        margins.append(teacher_scores - student_scores)
    return all_reduce_mean(_accuracy(torch.cat(margins))).item() > section.hold_above


@torch.no_grad()
def score(engine: Engine, clips: Tensor, condition: Tensor) -> Tensor:
    """Scores D(x, y) [N] of what a view returned (both [N, ...]), in micro batches, without gradient."""
    micro = 2 * engine.train_micro_batch_size_per_gpu()
    parts = zip(clips.split(micro), condition.split(micro), strict=True)
    return torch.cat([engine(part, prompt) for part, prompt in parts])
