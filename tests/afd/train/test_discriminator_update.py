"""One discriminator step on a stand-in engine whose gradients can be read: pairs, penalty, holding back, replay."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd.config import DiscriminatorSection
from afd.distributed import seeded_generator
from afd.models.clip_windows import ClipWindows
from afd.train.discriminator_update import update_discriminator
from afd.train.replay import RolloutReplay
from afd.types import Rollout, VideoBatch

SHAPE = (2, 3, 2, 2)


class LinearEngine(nn.Module):
    """D(x, y) = a . x with DeepSpeed's calls; gradients of a step stay readable in `gradient`."""

    def __init__(self, micro: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(24, generator=seeded_generator(5), dtype=torch.float64))
        self.micro, self.steps, self.gradient = micro, 0, torch.zeros(24, dtype=torch.float64)
        self.skipped_steps = 0

    def forward(self, latents: Tensor, prompt: Tensor) -> Tensor:
        return latents.flatten(1).double() @ self.a

    def backward(self, loss: Tensor) -> None:
        self.gradient += torch.autograd.grad(loss, self.a)[0]

    def step(self) -> None:
        self.steps += 1

    def get_lr(self) -> list[float]:
        return [0.25]

    def get_global_grad_norm(self) -> float:
        return self.gradient.norm().item()

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.micro


def make_batch(prompts: int = 2, group: int = 2, *, first: int = 0) -> tuple[VideoBatch, Rollout]:
    ids = torch.arange(first, first + prompts)
    teacher = torch.stack([torch.randn(SHAPE, generator=seeded_generator(1, int(i))) for i in ids])
    embeds = torch.zeros(prompts, 4, 8)
    rows = ids.repeat_interleave(group)
    fake = torch.stack([torch.randn(SHAPE, generator=seeded_generator(2, int(i), k)) for k, i in enumerate(rows)])
    batch = VideoBatch(ids, tuple(map(str, ids.tolist())), teacher, embeds)
    return batch, Rollout(fake, embeds.repeat_interleave(group, dim=0), rows, rows)


def update(engine: Any, section: DiscriminatorSection) -> dict[str, float]:
    teacher, rollout = make_batch()
    generators = [seeded_generator(3, row) for row in range(4)]
    metrics = update_discriminator(engine, teacher, rollout, section, generators)
    return {name.removeprefix("discriminator/"): float(value) for name, value in metrics.items()}


def test_penalty_is_the_directional_derivative_of_a_linear_discriminator() -> None:
    weight = 0.7
    plain, smooth = LinearEngine(4), LinearEngine(4)
    update(plain, DiscriminatorSection())
    metrics = update(smooth, DiscriminatorSection(r1_weight=weight, r1_sigma=1e-3))
    shifts = torch.stack([torch.randn(SHAPE, generator=seeded_generator(3, row)) for row in range(4)])
    slopes = shifts.flatten(1).double() @ smooth.a.detach()  # (D(x + sigma n) - D(x)) / sigma = a . n
    assert metrics["penalty"] == pytest.approx(slopes.square().mean().item(), rel=1e-3)  # float32 inputs
    expected = weight * 2 * (slopes[:, None] * shifts.flatten(1).double()).mean(dim=0)
    torch.testing.assert_close(smooth.gradient - plain.gradient, expected, rtol=1e-3, atol=1e-3)


def test_discriminator_that_ranks_enough_right_is_held() -> None:
    engine = LinearEngine(2)
    accuracy = update(engine, DiscriminatorSection())["accuracy"]
    assert 0 < accuracy < 1
    held, learns = LinearEngine(2), LinearEngine(2)
    metrics = update(held, DiscriminatorSection(hold_above=accuracy - 0.01))
    assert (metrics["held"], held.steps, held.gradient.abs().sum().item()) == (1.0, 0, 0.0)
    assert metrics["accuracy"] == accuracy, "it is still measured"
    assert update(learns, DiscriminatorSection(hold_above=accuracy))["held"] == 0.0
    assert learns.steps == 2


def test_learning_rate_and_gradient_norm_are_reported() -> None:
    engine = LinearEngine(4)
    metrics = update(engine, DiscriminatorSection())
    assert (metrics["lr"], metrics["skipped_steps"]) == (0.25, 0.0)
    assert metrics["grad_norm"] == pytest.approx(engine.gradient.norm().item())


def test_calibration_is_confidence_minus_accuracy() -> None:
    engine = LinearEngine(4)
    teacher, rollout = make_batch()
    margin = engine(teacher.latents, rollout.prompt_embeds).repeat_interleave(2) - engine(
        rollout.latents, rollout.prompt_embeds
    )
    metrics = update(engine, DiscriminatorSection(temperature=2.0))
    expected = torch.sigmoid(margin / 2).mean() - (margin > 0).double().mean()
    assert metrics["calibration"] == pytest.approx(expected.item(), abs=1e-6)


class WindowEngine(LinearEngine):
    """The same D on windows of two frames."""

    def __init__(self, micro: int) -> None:
        super().__init__(micro)
        self.module = ClipWindows(nn.Identity(), clip_frames=2, num_clips=2)
        self.module.scorer.forward = lambda clips, prompt: clips.flatten(1).double() @ self.a[:16]
        self.zero_optimization_stage = lambda: 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.seen = inputs[2]
        return self.module(*inputs)


def test_clips_of_a_pair_share_windows_whatever_the_micro_batch() -> None:
    metrics = []
    for micro in (4, 2):
        engine = WindowEngine(micro)
        metrics.append(update(engine, DiscriminatorSection(r1_weight=0.1)))
        metrics[-1].pop("grad_norm")  # of this engine a sum over micro batches
        assert engine.seen.shape == (3 * micro, 2), "real, fake and nearby, two windows each"
        real, fake, nearby = engine.seen.chunk(3)
        assert torch.equal(real, fake)
        assert torch.equal(real, nearby)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6), "float32 sums"


def test_replay_pairs_earlier_rollouts_with_their_own_teacher_clips() -> None:
    replay = RolloutReplay(num_steps=2, share=0.5)
    teachers: dict[bytes, bytes] = {}
    seen_old = differs = 0
    for step in range(6):
        teacher, rollout = make_batch(first=10 * step)
        for clip, fake in zip(teacher.latents.repeat_interleave(2, dim=0), rollout.latents, strict=True):
            teachers[fake.numpy().tobytes()] = clip.numpy().tobytes()
        pairs, mixed = replay.mix(teacher, rollout, seed=(0, step))
        for row, (clip, fake) in enumerate(zip(pairs.latents, mixed.latents, strict=True)):
            assert teachers[fake.numpy().tobytes()] == clip.numpy().tobytes()
            seen_old += not torch.equal(fake, rollout.latents[row])
        again, _ = replay.mix(teacher, rollout, seed=(0, step, 1))
        differs += not torch.equal(again.latents, pairs.latents)
        replay.remember(teacher, rollout)
        if step == 0:
            assert torch.equal(mixed.latents, rollout.latents), "nothing to replay yet"
    assert 4 <= seen_old <= 16, "about half of 20 rows"
    assert differs > 2, "each update of a step has replayed pairs of its own"
    assert len(replay.state_dict()) == 2


def test_replay_keeps_a_groups_teacher_clip_and_prompt_once_bit_for_bit() -> None:
    replay, expanded = (RolloutReplay(num_steps=2, share=0.9) for _ in range(2))
    prompts: dict[bytes, bytes] = {}
    for step in range(4):
        teacher, rollout = make_batch(group=4, first=10 * step)
        embeds = torch.randn(2, 4, 8, generator=seeded_generator(4, step)).repeat_interleave(4, dim=0)
        rollout = replace(rollout, prompt_embeds=embeds)
        for fake, embed in zip(rollout.latents, embeds, strict=True):
            prompts[fake.numpy().tobytes()] = embed.numpy().tobytes()
        _, mixed = replay.mix(teacher, rollout, seed=(0, step))
        replay.remember(teacher, rollout)
        for fake, embed in zip(mixed.latents, mixed.prompt_embeds, strict=True):
            assert prompts[fake.numpy().tobytes()] == embed.numpy().tobytes()
    state = replay.state_dict()
    assert [[len(each) for each in step] for step in state] == [[2, 8, 2]] * 2
    stored = sum(each.untyped_storage().nbytes() for step in state for each in step)
    assert stored == 2 * 4 * ((8 + 2) * 24 + 2 * 32), "(N + B) clips and B prompts, float32, two steps"

    older = [[real.repeat_interleave(4, dim=0), fake, each.repeat_interleave(4, dim=0)] for real, fake, each in state]
    expanded.load_state_dict(older)
    (pairs, mixed), (old_pairs, old_mixed) = (
        each.mix(*make_batch(group=4, first=90), seed=(0, 9)) for each in (replay, expanded)
    )
    assert torch.equal(pairs.latents, old_pairs.latents)
    assert torch.equal(mixed.latents, old_mixed.latents)
    assert torch.equal(mixed.prompt_embeds, old_mixed.prompt_embeds)


def test_replay_goes_on_from_its_state() -> None:
    first, second = (RolloutReplay(num_steps=3, share=0.9) for _ in range(2))
    for step in range(3):
        first.remember(*make_batch(first=10 * step))
    second.load_state_dict(first.state_dict())
    a, b = (each.mix(*make_batch(first=50), seed=(0, 9))[1].latents for each in (first, second))
    assert torch.equal(a, b)
