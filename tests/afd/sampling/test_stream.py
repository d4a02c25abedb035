"""Streams against whole rollouts, and a prompt change against a forward pass that knows no cache."""

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.config import StudentShape
from afd.models.dct_codec import DCTCodec
from afd.models.student import CausalStudent
from afd.rollout import SamplerTimes, rollout
from afd.sampling import StreamedChunk, StreamStatistics, stream_chunks
from afd.sampling.stream import stream_noise

TIMES = SamplerTimes(times=(1.0, 0.75))
SIZE = (2, 3)


def make_student(**changes: Any) -> CausalStudent:
    """A tiny random student for the DCT codec's 12 channels."""
    shape = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 12,
        "ffn_dim": 20,
        "freq_dim": 8,
        "text_len": 4,
        "text_dim": 6,
        "chunk_frames": 2,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = CausalStudent(StudentShape(**shape)).requires_grad_(False)
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return student


def prompts(seed: int, batch: int = 1) -> Tensor:
    """Random prompt embeddings [batch, 4, 6]."""
    return torch.randn(batch, 4, 6, generator=torch.Generator().manual_seed(seed))


def whole_noise(student: CausalStudent, num_chunks: int, *, seed: int, times: SamplerTimes, batch: int = 1) -> Tensor:
    """A stream's noise for all its chunks: [N, S, C, F, H, W]."""
    shape = student.shape
    lengths = [shape.first_chunk_frames or shape.chunk_frames, *[shape.chunk_frames] * (num_chunks - 1)]
    return torch.cat(
        [stream_noise(seed, i, batch, times.num_noises, (12, length, *SIZE)) for i, length in enumerate(lengths)], dim=3
    )


@pytest.mark.parametrize(
    ("shape", "times"),
    [
        ({}, TIMES),
        ({"first_chunk_frames": 1}, TIMES),
        ({"window_frames": 4, "sink_frames": 1}, TIMES),
        ({"chunk_frames": 1}, SamplerTimes(times=(1.0,), first_chunk_times=(1.0, 0.5), context_noise=0.1)),
    ],
)
def test_a_stream_is_the_whole_rollout_chunk_by_chunk(shape: dict[str, Any], times: SamplerTimes) -> None:
    student, codec, embeds = make_student(**shape), DCTCodec(), prompts(1, batch=2)
    latents = rollout(student, embeds, whole_noise(student, 4, seed=3, times=times, batch=2), times)
    chunks = list(stream_chunks(student, codec, embeds, times, latent_size=SIZE, seed=3, num_chunks=4))
    torch.testing.assert_close(torch.cat([chunk.latents for chunk in chunks], 2), latents, rtol=0, atol=1e-5)
    frames = [chunk.frames for chunk in chunks if chunk.frames is not None]
    torch.testing.assert_close(torch.cat(frames, 1), codec.decode(latents), rtol=0, atol=1e-5)
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.first_frame for chunk in chunks] == [0, *itertools.accumulate(c.num_frames for c in chunks[:-1])]
    assert {chunk.prompt_version for chunk in chunks} == {0}


def test_without_a_codec_latents_come_alone() -> None:
    (chunk,) = stream_chunks(make_student(), None, prompts(1), TIMES, latent_size=SIZE, seed=0, num_chunks=1)
    assert chunk.frames is None
    assert chunk.decode_s == 0.0
    assert chunk.num_frames == chunk.latents.shape[2] == 2


@torch.no_grad()
def test_a_prompt_change_counts_from_the_next_chunk_and_keeps_the_context() -> None:
    """With one block, context keys and values do not depend on the prompt: a teacher-forcing pass is the reference."""
    student = make_student(num_layers=1).double()
    by_chunk = [prompts(1), prompts(1), prompts(2), prompts(1)]
    asked = iter([by_chunk[0], by_chunk[0], by_chunk[2], by_chunk[3]])
    chunks = list(
        stream_chunks(student, None, lambda: next(asked), TIMES, latent_size=SIZE, seed=5, num_chunks=4)
    )  # float32 noise, float64 inside
    assert [chunk.prompt_version for chunk in chunks] == [0, 0, 1, 2]
    noise = whole_noise(student, 4, seed=5, times=TIMES)
    finished = torch.zeros(1, 12, 8, *SIZE)
    for index, embeds in enumerate(by_chunk):
        span = slice(2 * index, 2 * index + 2)
        x_t = x0 = noise[:, 0, :, span]
        for step, time in enumerate(TIMES.times):
            whole = torch.zeros_like(finished)
            whole[:, :, span] = x_t
            v = student(whole, torch.full((1, 8), time), embeds, clean=finished)[:, :, span]
            x0 = x_t - time * v
            if step == 0:
                x_t = 0.25 * x0 + 0.75 * noise[:, 1, :, span]
        finished[:, :, span] = x0
        torch.testing.assert_close(chunks[index].latents, x0, rtol=0, atol=1e-4)
    kept = list(stream_chunks(student, None, by_chunk[0], TIMES, latent_size=SIZE, seed=5, num_chunks=4))
    assert torch.equal(chunks[1].latents, kept[1].latents)
    assert not torch.allclose(chunks[2].latents, kept[2].latents, atol=1e-3)


def live_bytes() -> int:
    """Bytes of all tensors alive."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) is Tensor]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_an_endless_stream_needs_a_window_and_bounded_memory() -> None:
    student = make_student(window_frames=4, sink_frames=2, num_layers=1)
    stream = stream_chunks(student, DCTCodec(), prompts(1), TIMES, latent_size=SIZE, seed=0)
    sizes = []
    for chunk in itertools.islice(stream, 150):  # longer than every cache of tables
        assert chunk.latents.isfinite().all()
        if chunk.index in (80, 149):
            sizes.append(live_bytes())
    assert sizes[0] == sizes[1]
    with pytest.raises(ValueError, match=r"needs student\.window_frames"):
        next(stream_chunks(make_student(), None, prompts(1), TIMES, latent_size=SIZE, seed=0))


def test_chunks_are_made_when_they_are_asked_for() -> None:
    calls = []

    def ask() -> Tensor:
        calls.append(len(calls))
        return EMBEDS

    stream = stream_chunks(make_student(window_frames=2), None, ask, TIMES, latent_size=SIZE, seed=0)
    assert calls == []
    next(stream)
    assert calls == [0]
    next(stream)
    assert calls == [0, 1]


EMBEDS = prompts(1)


def test_noise_depends_on_seed_chunk_and_row_alone() -> None:
    noise = stream_noise(1, 2, 3, 2, (12, 2, 2, 3))
    assert noise.shape == (3, 2, 12, 2, 2, 3)
    assert torch.equal(noise[:2], stream_noise(1, 2, 2, 2, (12, 2, 2, 3)))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, stream_noise(1, 3, 3, 2, (12, 2, 2, 3)))


def test_statistics_leave_the_first_chunk_out_of_the_steady_speed() -> None:
    def chunk(index: int, generate_s: float, decode_s: float) -> StreamedChunk:
        return StreamedChunk(index, 3 * index, 3, EMBEDS, None, 0, generate_s, decode_s, 0.0)

    statistics = StreamStatistics()
    assert (statistics.first_chunk_s, statistics.fps, statistics.fps_without_decoding) == (None, None, None)
    statistics.add(chunk(0, 4.0, 1.0))
    assert (statistics.first_chunk_s, statistics.fps) == (5.0, None)
    statistics.add(chunk(1, 1.0, 0.5))
    statistics.add(chunk(2, 2.0, 0.5))
    assert statistics.num_frames == 9
    assert statistics.fps == pytest.approx(6 / 4)
    assert statistics.fps_without_decoding == pytest.approx(6 / 3)
    assert statistics.peak_chunk_s == pytest.approx(2.5)


@pytest.mark.slow
def test_a_stream_through_wans_vae_is_the_whole_decode(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    from afd.models.wan_vae import WanVAE

    config: dict[str, Any] = {"base_dim": 4, "z_dim": 12, "num_res_blocks": 1}
    vae: Any = AutoencoderKLWan(**config, latents_mean=[0.1] * 12, latents_std=[2.0] * 12)
    vae.save_pretrained(tmp_path)
    codec, student, embeds = WanVAE(tmp_path), make_student(), prompts(1)
    latents = rollout(student, embeds, whole_noise(student, 3, seed=3, times=TIMES), TIMES)
    chunks = list(stream_chunks(student, codec, embeds, TIMES, latent_size=SIZE, seed=3, num_chunks=3))
    assert [(chunk.first_frame, chunk.num_frames) for chunk in chunks] == [(0, 5), (5, 8), (13, 8)]
    frames = torch.cat([chunk.frames for chunk in chunks if chunk.frames is not None], 1)
    torch.testing.assert_close(frames, codec.decode(latents), rtol=0, atol=1e-4)
