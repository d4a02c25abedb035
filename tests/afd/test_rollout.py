"""The sampler against a slow reference that knows no cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.rollout import chunk_spans, rollout, rollout_noise


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


@torch.no_grad()
def slow_rollout(student: CausalStudent, prompt: Tensor, noise: Tensor, times: tuple[float, ...]) -> Tensor:
    """Section by section from the description: x0 from v at each time, fresh noise to the next, no cache.

    Every velocity is one teacher-forcing pass over the whole video with the finished chunks as clean context.
    """
    n, _, channels, num_frames, height, width = noise.shape
    first = student.shape.first_chunk_frames or student.shape.chunk_frames
    finished = torch.zeros(n, channels, num_frames, height, width, dtype=noise.dtype)
    start, end = 0, first
    while start < num_frames:
        x_t = x0 = noise[:, 0, :, start:end]
        for step, time in enumerate(times):
            whole = torch.zeros_like(finished)
            whole[:, :, start:end] = x_t
            t = torch.full((n, num_frames), time, dtype=noise.dtype)
            v = student(whole, t, prompt, clean=finished)[:, :, start:end]
            x0 = x_t - time * v
            if step + 1 < len(times):
                following = times[step + 1]
                x_t = (1 - following) * x0 + following * noise[:, step + 1, :, start:end]
        finished[:, :, start:end] = x0
        start, end = end, end + student.shape.chunk_frames
    return finished


@pytest.mark.parametrize(
    ("shape", "size", "times"),
    [
        ({"chunk_frames": 1}, (5, 3, 2), (1.0, 0.75)),
        ({"chunk_frames": 3, "patch_size": (1, 2, 1)}, (6, 4, 3), (1.0, 15 / 16, 5 / 6, 5 / 8)),
        ({"chunk_frames": 2, "window_frames": 3, "sink_frames": 1}, (8, 1, 3), (1.0, 0.5)),
        ({"chunk_frames": 2, "first_chunk_frames": 1}, (5, 2, 2), (1.0,)),
    ],
)
def test_rollout_matches_the_recomputed_reference(
    shape: dict[str, Any], size: tuple[int, int, int], times: tuple[float, ...]
) -> None:
    student = make_student(**shape)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, len(times), 3, *size, generator=generator, dtype=torch.float64)
    prompt = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    latents = rollout(student, prompt, noise, times)
    assert latents.shape == (2, 3, *size)
    assert latents.dtype == torch.float64
    assert not latents.requires_grad
    torch.testing.assert_close(latents, slow_rollout(student, prompt, noise, times), rtol=0, atol=1e-10)


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    student = make_student(chunk_frames=2)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, 2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    prompt = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    together = rollout(student, prompt, noise, (1.0, 0.5))
    alone = torch.cat([rollout(student, prompt[i : i + 1], noise[i : i + 1], (1.0, 0.5)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


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
    with pytest.raises(ValueError, match=r"noise must be \[N, 2, C, F, H, W\] for 2 times, got \["):
        rollout(make_student(), torch.zeros(2, 4, 6), torch.zeros(shape), (1.0, 0.5))


def test_chunk_spans_cover_the_video() -> None:
    assert chunk_spans(make_student(chunk_frames=3), 6) == [(0, 3), (3, 6)]
    assert chunk_spans(make_student(chunk_frames=3), 3) == [(0, 3)]
    assert chunk_spans(make_student(chunk_frames=2, first_chunk_frames=1), 5) == [(0, 1), (1, 3), (3, 5)]


@pytest.mark.parametrize(
    ("shape", "num_frames", "first"),
    [({"chunk_frames": 3}, 7, 3), ({"chunk_frames": 3}, 2, 3), ({"chunk_frames": 2, "first_chunk_frames": 1}, 4, 1)],
)
def test_a_video_must_divide_into_chunks(shape: dict[str, Any], num_frames: int, first: int) -> None:
    student = make_student(**shape)
    message = rf"num_frames must be {first} \+ a multiple of chunk_frames = {shape['chunk_frames']}, got {num_frames}"
    with pytest.raises(ValueError, match=message):
        chunk_spans(student, num_frames)
