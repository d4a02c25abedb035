"""The sampler against a slow reference that knows no cache, step by step for every student family we ship."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.config import StudentShape
from afd.config_file import load_config
from afd.models.conditioning import ImageCondition
from afd.models.student import CausalStudent
from afd.rollout import RolloutSampler, SamplerTimes, chunk_spans, rollout, rollout_noise, sampler_times

CONFIGS = Path(__file__).parents[2] / "configs"
TWO_STEPS = SamplerTimes((1.0, 0.5))


def make_student(**changes: Any) -> CausalStudent:
    """A tiny random student in float64."""
    shape = StudentShape(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 2,
            "num_heads": 2,
            "head_dim": 12,
            "ffn_dim": 20,
            "freq_dim": 8,
            "text_len": 4,
            "text_dim": 6,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CausalStudent(shape).double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def slow_rollout(student: CausalStudent, prompt: Tensor, noise: Tensor, times: SamplerTimes) -> Tensor:
    """Section by section from the description: x0 from v at each time, fresh noise to the next, no cache.

    Every velocity is one teacher-forcing pass over the whole video with the finished chunks as context, noised to the
    context's time by the last noise.
    """
    n, _, channels, num_frames, height, width = noise.shape
    context = torch.zeros(n, channels, num_frames, height, width, dtype=noise.dtype)
    finished = torch.zeros_like(context)
    start, end = 0, student.shape.first_chunk_frames or student.shape.chunk_frames
    while start < num_frames:
        steps = times.first_chunk_times if start == 0 and times.first_chunk_times is not None else times.times
        x_t = x0 = noise[:, 0, :, start:end]
        for step, time in enumerate(steps):
            whole = torch.zeros_like(context)
            whole[:, :, start:end] = x_t
            t = torch.full((n, num_frames), time, dtype=noise.dtype)
            v = student(whole, t, prompt, clean=context, context_noise=times.context_noise)[:, :, start:end]
            x0 = x_t - time * v
            if step + 1 < len(steps):
                following = steps[step + 1]
                x_t = (1 - following) * x0 + following * noise[:, step + 1, :, start:end]
        finished[:, :, start:end] = x0
        s = times.context_noise
        context[:, :, start:end] = (1 - s) * x0 + s * noise[:, -1, :, start:end]
        start, end = end, end + student.shape.chunk_frames
    return finished


@pytest.mark.parametrize(
    ("shape", "size", "times"),
    [
        ({"chunk_frames": 1}, (5, 3, 2), SamplerTimes((1.0, 0.75))),
        ({"chunk_frames": 3, "patch_size": (1, 2, 1)}, (6, 4, 3), SamplerTimes((1.0, 15 / 16, 5 / 6, 5 / 8))),
        ({"chunk_frames": 2, "window_frames": 3, "sink_frames": 1}, (8, 1, 3), TWO_STEPS),
        ({"chunk_frames": 2, "first_chunk_frames": 1}, (5, 2, 2), SamplerTimes((1.0,))),
        ({"chunk_frames": 2}, (6, 1, 2), SamplerTimes((1.0, 0.5), first_chunk_times=(1.0, 0.8, 0.5, 0.2))),
        ({"chunk_frames": 2}, (6, 1, 2), SamplerTimes((1.0, 0.5), first_chunk_times=(1.0,), context_noise=0.1)),
        (
            {"chunk_frames": 1, "first_chunk_frames": 2, "window_frames": 3, "sink_frames": 2},
            (8, 2, 1),
            SamplerTimes((1.0, 0.5), first_chunk_times=(1.0, 0.9, 0.5), context_noise=0.2),
        ),
    ],
)
def test_rollout_matches_the_recomputed_reference(
    shape: dict[str, Any], size: tuple[int, int, int], times: SamplerTimes
) -> None:
    student = make_student(**shape)
    noise, prompt = normal(2, times.num_noises, 3, *size), normal(2, 4, 6)
    latents = rollout(student, prompt, noise, times)
    assert latents.shape == (2, 3, *size)
    assert latents.dtype == torch.float64
    assert not latents.requires_grad
    torch.testing.assert_close(latents, slow_rollout(student, prompt, noise, times), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("wan_*.yaml")))
def test_a_shipped_family_rolls_out_as_described(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    section, times = config.student, sampler_times(config.rollout)
    chunking = {key: getattr(section, key) or None for key in ("chunk_frames", "first_chunk_frames", "window_frames")}
    student = make_student(**chunking, sink_frames=section.sink_frames or 0, patch_size=section.patch_size)
    noise, prompt = normal(1, times.num_noises, 3, config.video.num_frames, 2, 2), normal(1, 4, 6)
    latents = rollout(student, prompt, noise, times)
    torch.testing.assert_close(latents, slow_rollout(student, prompt, noise, times), rtol=0, atol=1e-10)


def test_the_families_walk_the_shift_5_grid() -> None:
    """s' = 5 s / (1 + 4 s) at 1000, 750, 500, 250 of 1000: the times of both families."""
    for name in ("wan_1_3b_self_forcing", "wan_1_3b_causal_forcing", "wan_14b"):
        times = sampler_times(load_config(CONFIGS / f"{name}.yaml").rollout)
        assert times.times == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8))
        assert times.context_noise == 0


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    student = make_student(chunk_frames=2)
    noise, prompt = normal(3, 2, 3, 4, 2, 2), normal(3, 4, 6)
    together = rollout(student, prompt, noise, TWO_STEPS)
    alone = torch.cat([rollout(student, prompt[i : i + 1], noise[i : i + 1], TWO_STEPS) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_generation_without_end_equals_the_whole_video_in_bounded_memory() -> None:
    student = make_student(chunk_frames=2, window_frames=4, sink_frames=1)
    noise, prompt = normal(1, 2, 3, 40, 1, 2), normal(1, 4, 6)
    sampler = RolloutSampler(student, prompt, TWO_STEPS, latent_size=(1, 2))
    kept = sampler._cache.num_bytes
    chunks = [sampler.next_chunk(noise[:, :, :, f : f + 2]) for f in range(0, 40, 2)]
    assert sampler._cache.num_bytes == kept == 2 * 2 * 5 * 2 * 24 * 8  # layers, k and v, frames, tokens, width, bytes
    assert (sampler.num_chunks, sampler.num_frames) == (20, 40)
    torch.testing.assert_close(torch.cat(chunks, dim=2), rollout(student, prompt, noise, TWO_STEPS), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.cat(chunks, dim=2), slow_rollout(student, prompt, noise, TWO_STEPS), rtol=0, atol=1e-10
    )


def test_a_new_prompt_changes_what_follows_and_nothing_before() -> None:
    student = make_student(chunk_frames=2)
    noise, first, second = normal(1, 2, 3, 6, 1, 2), normal(1, 4, 6, seed=2), normal(1, 4, 6, seed=3)
    sampler = RolloutSampler(student, first, TWO_STEPS, latent_size=(1, 2), num_frames=6)
    chunks = [sampler.next_chunk(noise[:, :, :, :2])]
    sampler.set_prompt(second)
    chunks += [sampler.next_chunk(noise[:, :, :, f : f + 2]) for f in (2, 4)]
    stayed = rollout(student, first, noise, TWO_STEPS)
    assert torch.equal(chunks[0], stayed[:, :, :2])
    assert not torch.allclose(chunks[1], stayed[:, :, 2:4])
    assert not torch.allclose(chunks[1], rollout(student, second, noise, TWO_STEPS)[:, :, 2:4])


def test_a_bfloat16_student_denoises_float32_latents() -> None:
    student, noise, prompt = make_student(chunk_frames=2), normal(2, 2, 3, 4, 2, 2), normal(2, 4, 6)
    exact = rollout(student, prompt, noise, TWO_STEPS)
    latents = rollout(student.bfloat16(), prompt.float(), noise.float(), TWO_STEPS)
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float()), "the latents themselves are not rounded to bfloat16"
    assert (latents - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()  # bfloat16: 8 bits


def test_noise_rows_depend_on_their_key_alone() -> None:
    keys = [(0, 1, sample, g) for sample in (5, 9) for g in range(2)]
    noise = rollout_noise(keys, 2, (3, 4, 2, 5))
    assert noise.shape == (4, 2, 3, 4, 2, 5)
    assert noise.dtype == torch.float32
    for row, key in zip(noise, keys, strict=True):
        assert torch.equal(row, rollout_noise([key], 2, (3, 4, 2, 5))[0])
    assert torch.equal(rollout_noise(keys[::-1], 2, (3, 4, 2, 5)), noise.flip(0))
    assert len({row.sum().item() for row in noise}) == 4


def test_noise_is_standard_normal() -> None:
    noise = rollout_noise([(0, i) for i in range(50)], 4, (4, 6, 4, 4))
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02


@pytest.mark.parametrize("shape", [(2, 3, 3, 4, 2, 2), (2, 3, 4, 2, 2)])
def test_noise_must_match_the_times(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"noise must be \[N, 2, C, F, H, W\] for 1\.0000, 0\.5000, got \["):
        rollout(make_student(), torch.zeros(2, 4, 6), torch.zeros(shape), TWO_STEPS)


def test_a_chunk_needs_noise_of_its_own_length_and_for_every_step() -> None:
    times = replace(TWO_STEPS, context_noise=0.1)
    sampler = RolloutSampler(make_student(), torch.zeros(2, 4, 6), times, latent_size=(1, 2), num_frames=6)
    for shape in ((2, 3, 3, 2, 1, 2), (2, 2, 3, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"noise must be \[N, 3, C, 3, H, W\] for this chunk, got \["):
            sampler.next_chunk(torch.zeros(shape))


def test_the_last_noise_is_the_contexts() -> None:
    assert TWO_STEPS.num_noises == 2
    assert replace(TWO_STEPS, context_noise=0.1).num_noises == 3
    assert replace(TWO_STEPS, first_chunk_times=(1.0, 0.9, 0.5, 0.1), context_noise=0.1).num_noises == 5


def test_chunk_spans_cover_the_video() -> None:
    assert chunk_spans(StudentShape(chunk_frames=3), 6) == ((0, 3), (3, 6))
    assert chunk_spans(StudentShape(chunk_frames=3), 3) == ((0, 3),)
    assert chunk_spans(StudentShape(chunk_frames=2, first_chunk_frames=1), 5) == ((0, 1), (1, 3), (3, 5))


@pytest.mark.parametrize(
    ("shape", "num_frames", "first"),
    [({"chunk_frames": 3}, 7, 3), ({"chunk_frames": 3}, 2, 3), ({"chunk_frames": 2, "first_chunk_frames": 1}, 4, 1)],
)
def test_a_video_must_divide_into_chunks(shape: dict[str, Any], num_frames: int, first: int) -> None:
    chunk = shape["chunk_frames"]
    message = rf"num_frames must be {first} \+ a multiple of the student's chunk {chunk}, got {num_frames}"
    with pytest.raises(ValueError, match=message):
        chunk_spans(StudentShape(**shape), num_frames)


@pytest.mark.parametrize("context_noise", [0.0, 0.1])
def test_a_given_first_frame_is_continued_as_if_it_had_been_generated(context_noise: float) -> None:
    student, prompt = make_student(chunk_frames=2, first_chunk_frames=1), normal(2, 4, 6)
    times = replace(TWO_STEPS, context_noise=context_noise)
    noise = normal(2, times.num_noises, 3, 5, 2, 2)
    whole = rollout(student, prompt, noise, times)
    sampler = RolloutSampler(student, prompt, times, latent_size=(2, 2), num_frames=5)
    sampler.give_chunk(whole[:, :, :1], noise[:, -1, :, :1])
    chunks = [sampler.next_chunk(noise[:, :, :, start:end]) for start, end in ((1, 3), (3, 5))]
    assert torch.equal(torch.cat(chunks, dim=2), whole[:, :, 1:])


def test_a_given_chunk_must_fit() -> None:
    times = replace(TWO_STEPS, context_noise=0.1)
    sampler = RolloutSampler(make_student(chunk_frames=2), normal(1, 4, 6), times, latent_size=(2, 2), num_frames=4)
    with pytest.raises(ValueError, match=r"x0 must be \[N, C, 2, H, W\] for this chunk, got \[1, 3, 1, 2, 2\]"):
        sampler.give_chunk(normal(1, 3, 1, 2, 2))
    with pytest.raises(ValueError, match=r"context_noise must be \[1, 3, 2, 2, 2\] like x0, got None"):
        sampler.give_chunk(normal(1, 3, 2, 2, 2))


def test_an_image_to_video_student_rolls_out_what_it_is_trained_on() -> None:
    student = make_student(in_channels=8, chunk_frames=2, image_dim=5)
    prompt, noise = normal(2, 4, 6), normal(2, 1, 3, 4, 2, 2)
    image = ImageCondition(normal(2, 5, 4, 2, 2, seed=2), normal(2, 3, 5, seed=3))
    one_step = SamplerTimes((0.8,))
    sampler = RolloutSampler(student, prompt, one_step, latent_size=(2, 2), num_frames=4, image=image)
    video = torch.cat([sampler.next_chunk(noise[:, :, :, start : start + 2]) for start in (0, 2)], dim=2)
    t = torch.full((2, 4), 0.8, dtype=torch.float64)
    with torch.no_grad():
        v = student(noise[:, 0], t, prompt, clean=video, image=image)
        other = student(noise[:, 0], t, prompt, clean=video, image=image_of_zeros(image))
    torch.testing.assert_close(noise[:, 0] - 0.8 * v, video, rtol=0, atol=1e-10)
    assert (v - other).abs().max() > 1e-2
    for wrong, message in (
        (ImageCondition(None, image.embeds), r"image.latents must be \[2, 5, 4, 2, 2\] for this student, got None"),
        (ImageCondition(image.latents, None), r"image.embeds must be \[2, tokens, 5\] .* got None"),
    ):
        with pytest.raises(ValueError, match=message):
            student(noise[:, 0], t, prompt, image=wrong)


def image_of_zeros(image: ImageCondition) -> ImageCondition:
    """Another image of the same sizes."""
    assert image.latents is not None
    assert image.embeds is not None
    return ImageCondition(torch.zeros_like(image.latents), torch.zeros_like(image.embeds))
