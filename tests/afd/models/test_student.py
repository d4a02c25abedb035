"""The causal student: parity with the public Self-Forcing code, causality, and rollouts equal to training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights import check_names_and_shapes, diffusers_name

MakeStudent = Callable[..., CausalStudent]
# Weights, inputs and outputs of the public Self-Forcing code on a random tiny model, float32 on a CPU.
REFERENCE = Path(__file__).parents[2] / "data" / "self_forcing_tiny.safetensors"
REFERENCE_SHAPE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 32,
    "ffn_dim": 160,
    "freq_dim": 256,
    "text_len": 8,
    "text_dim": 24,
}
FLOAT32_TOLERANCE = 2e-5
FLOAT64_TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """The reference file's tensors."""
    return load_file(REFERENCE)


def reference_student(reference: dict[str, Tensor], **changes: Any) -> CausalStudent:
    """The reference's model in ours."""
    student = CausalStudent(StudentShape(**REFERENCE_SHAPE, **changes))
    weights = {diffusers_name(k.removeprefix("weight.")): v for k, v in reference.items() if k.startswith("weight.")}
    check_names_and_shapes(student.state_dict(), weights, source="reference")
    student.load_state_dict(weights)
    return student


def inputs(
    student: CausalStudent, num_frames: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random noisy latents, t (constant within a chunk), prompt embeddings and clean latents of two videos."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, student.shape.in_channels, num_frames, height, width)
    noisy, clean = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.rand(2, num_frames, generator=generator, dtype=dtype)
    for start, end in chunks(student, num_frames):
        t[:, start:end] = t[:, start : start + 1]
    prompt = torch.randn(2, student.shape.text_len, student.shape.text_dim, generator=generator, dtype=dtype)
    return noisy, t, prompt, clean


def chunks(student: CausalStudent, num_frames: int) -> list[tuple[int, int]]:
    """Frames [start, end) of each chunk."""
    step = student.shape.chunk_frames
    first = student.shape.first_chunk_frames or step
    starts = [0, *range(first, num_frames, step)]
    return list(zip(starts, [*starts[1:], num_frames], strict=True))


@torch.no_grad()
def cached_velocities(student: CausalStudent, noisy: Tensor, t: Tensor, prompt: Tensor, clean: Tensor) -> Tensor:
    """Chunk by chunk: the noisy chunk against the cache, then the clean chunk at t = 0 written to it."""
    cache = student.new_cache(len(noisy), noisy.shape[2], (noisy.shape[3], noisy.shape[4]), device=noisy.device)
    keys_values = student.prompt_keys_values(prompt)
    velocities = []
    for start, end in chunks(student, noisy.shape[2]):
        cache.begin_chunk(end - start)
        now = slice(start, end)
        for latents, time in ((noisy, t), (clean, torch.zeros_like(t))):
            v = student.forward_chunk(latents[:, :, now], time[:, now], keys_values, cache, frame_offset=start)
            if latents is noisy:
                velocities.append(v)
    return torch.cat(velocities, dim=2)


@pytest.mark.parametrize("chunk_frames", [1, 3])
@pytest.mark.parametrize("layout", ["teacher_forcing", "block_causal"])
def test_forward_matches_public_self_forcing(reference: dict[str, Tensor], layout: str, chunk_frames: int) -> None:
    student = reference_student(reference, chunk_frames=chunk_frames)
    clean = reference["clean"] if layout == "teacher_forcing" else None
    with torch.no_grad():
        v = student(reference["x"], reference[f"t.chunk{chunk_frames}"] / 1000, reference["context"], clean=clean)
    expected = reference[f"out.{layout}.chunk{chunk_frames}"]
    torch.testing.assert_close(v, expected, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("window", "sink"), [(4, 1), (3, 0)])
def test_cached_rollout_matches_public_self_forcing(reference: dict[str, Tensor], window: int, sink: int) -> None:
    # The public window counts the sink's frames as well.
    student = reference_student(reference, chunk_frames=1, window_frames=window - sink, sink_frames=sink)
    arguments = reference["x"], reference["t.chunk1"] / 1000, reference["context"], reference["clean"]
    expected = reference[f"out.kv_cached.window{window}_sink{sink}.chunk1"]
    torch.testing.assert_close(cached_velocities(student, *arguments), expected, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ({"chunk_frames": 1}, (5, 3, 7)),
        ({"chunk_frames": 3, "patch_size": (1, 2, 2)}, (6, 6, 10)),
        ({"chunk_frames": 1, "window_frames": 2, "sink_frames": 1}, (7, 3, 2)),
        ({"chunk_frames": 3, "window_frames": 4, "sink_frames": 2}, (12, 2, 3)),
        ({"chunk_frames": 3, "window_frames": 5}, (9, 1, 3)),
        ({"chunk_frames": 2, "first_chunk_frames": 1, "window_frames": 3, "sink_frames": 1}, (7, 2, 2)),
        ({"chunk_frames": 2, "first_chunk_frames": 3, "cross_attn_norm": False}, (7, 2, 1)),
    ],
)
def test_rollout_matches_teacher_forced_velocity(
    make_student: MakeStudent, shape: dict[str, Any], size: tuple[int, int, int]
) -> None:
    student = make_student(dtype=torch.float64, **shape)
    noisy, t, prompt, clean = inputs(student, *size, dtype=torch.float64)
    with torch.no_grad():
        trained = student(noisy, t, prompt, clean=clean)
    cached = cached_velocities(student, noisy, t, prompt, clean)
    assert cached.std() > 0.1
    torch.testing.assert_close(cached, trained, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("with_clean", [True, False])
def test_a_later_frame_changes_no_earlier_output(make_student: MakeStudent, with_clean: bool) -> None:
    student = make_student(dtype=torch.float64, chunk_frames=2)
    noisy, t, prompt, clean = inputs(student, 6, 2, 3, dtype=torch.float64)
    context = clean if with_clean else None

    def changed(noisy: Tensor, t: Tensor, context: Tensor | None) -> list[bool]:
        v = student(noisy, t, prompt, clean=context)
        return [not torch.equal(v[:, :, f], before[:, :, f]) for f in range(6)]

    with torch.no_grad():
        before = student(noisy, t, prompt, clean=context)
        other = noisy.clone()
        other[:, :, 3] += 1
        # Teacher forcing: a noisy chunk is seen by itself alone. Block-causal: by later chunks as well.
        assert changed(other, t, context) == [False, False, True, True, not with_clean, not with_clean]
        later = t.clone()
        later[:, 2:4] *= 0.5
        assert changed(noisy, later, context) == [False, False, True, True, not with_clean, not with_clean]
        if context is not None:
            other = context.clone()
            other[:, :, 2] += 1
            assert changed(noisy, t, other) == [False, False, False, False, True, True]


def test_every_parameter_gets_a_gradient(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1, patch_size=(1, 2, 1))
    noisy, t, prompt, clean = inputs(student, 3, 4, 3)
    student(noisy, t, prompt, clean=clean).square().mean().backward()
    silent = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant added to all keys shifts every logit of a query alike, unless a norm follows it; here one does.
    assert silent == []


def test_checkpointing_changes_no_gradient(make_student: MakeStudent) -> None:
    student = make_student(dtype=torch.float64, chunk_frames=1)
    noisy, t, prompt, clean = inputs(student, 3, 2, 3, dtype=torch.float64)

    def gradients(is_on: bool) -> dict[str, Tensor]:
        student.gradient_checkpointing = is_on
        student.zero_grad()
        student(noisy, t, prompt, clean=clean).square().mean().backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_short_prompts_are_zero_padded(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1)
    noisy, t, prompt, _ = inputs(student, 2, 2, 2)
    padded = prompt.clone()
    padded[:, 3:] = 0
    with torch.no_grad():
        assert torch.equal(student(noisy, t, prompt[:, :3]), student(noisy, t, padded))
        assert not torch.equal(student(noisy, t, prompt), student(noisy, t, padded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noisy": (2, 4, 3, 4)}, r"latents must be \[N, 4, F, 2 x rows, 1 x columns\], got \[2, 4, 3, 4\]"),
        ({"noisy": (2, 5, 3, 4, 3)}, r"latents must be \[N, 4, F, .*got \[2, 5, 3, 4, 3\]"),
        ({"noisy": (2, 4, 3, 5, 3)}, r"latents must be \[N, 4, F, .*got \[2, 4, 3, 5, 3\]"),
        ({"t": (2, 4)}, r"t must be \[2, 3\], got \[2, 4\]"),
        ({"t": (2,)}, r"t must be \[2, 3\], got \[2\]"),
        ({"prompt": (2, 6, 6)}, r"prompt_embeds must be \[N, up to 5, 6\], got \[2, 6, 6\]"),
        ({"prompt": (2, 5, 7)}, r"prompt_embeds must be \[N, up to 5, 6\], got \[2, 5, 7\]"),
        ({"prompt": (5, 6)}, r"prompt_embeds must be \[N, up to 5, 6\], got \[5, 6\]"),
        ({"clean": (2, 4, 4, 4, 3)}, r"clean must be \[2, 4, 3, 4, 3\] like the noisy latents, got \[2, 4, 4, 4, 3\]"),
    ],
)
def test_wrong_shapes_are_named(make_student: MakeStudent, change: dict[str, tuple[int, ...]], message: str) -> None:
    student = make_student(chunk_frames=1, patch_size=(1, 2, 1))
    shapes = {"noisy": (2, 4, 3, 4, 3), "t": (2, 3), "prompt": (2, 5, 6), "clean": (2, 4, 3, 4, 3), **change}
    noisy, t, prompt, clean = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        student(noisy, t, prompt, clean=clean)


def test_a_prompt_too_long_for_the_rollout_is_refused(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1)
    with pytest.raises(ValueError, match=r"prompt_embeds must be \[N, up to 5, 6\], got \[2, 6, 6\]"):
        student.prompt_keys_values(torch.zeros(2, 6, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": (2, 1, 1)}, "patch_size must start with 1"),
        ({"head_dim": 7}, "head_dim and freq_dim must be even, got 7 and 8"),
        ({"freq_dim": 7}, "head_dim and freq_dim must be even, got 12 and 7"),
        ({"chunk_frames": 3, "window_frames": 2}, "window_frames must hold a chunk of 3 frames, got 2"),
        ({"first_chunk_frames": 4, "window_frames": 3}, "window_frames must hold a chunk of 4 frames, got 3"),
    ],
)
def test_impossible_shapes_are_refused(make_student: MakeStudent, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_student(**change)
