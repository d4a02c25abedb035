"""With equal random weights the student with one chunk computes what diffusers' WanTransformer3DModel computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd.config import StudentShape
from afd.models.conditioning import ImageCondition
from afd.models.student import CausalStudent

MakePair = Callable[..., tuple[Any, CausalStudent]]
FRAMES, ROWS, COLUMNS = 5, 6, 10
TEXT_LEN = 512  # diffusers counts the image's tokens as everything before the last 512
IMAGE_TOKENS = 7


@pytest.fixture
def tiny_pair(make_transformer: Callable[[StudentShape], Any]) -> MakePair:
    """`tiny_pair(**shape)`: a random diffusers model and the student with its weights; none at its special start."""

    def make(**changes: Any) -> tuple[Any, CausalStudent]:
        shape = StudentShape(
            **{
                "in_channels": 16,
                "out_channels": 16,
                "patch_size": (1, 2, 2),
                "num_layers": 2,
                "num_heads": 3,
                "head_dim": 16,
                "ffn_dim": 72,
                "freq_dim": 32,
                "text_len": TEXT_LEN,
                "text_dim": 20,
                "chunk_frames": FRAMES,
                "numerics": "diffusers",
                **changes,
            }
        )
        torch.manual_seed(3)
        theirs = make_transformer(shape)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.2)
        ours = CausalStudent(shape)
        ours.load_state_dict(theirs.state_dict())
        return theirs.eval(), ours.eval()

    return make


def inputs(shape: StudentShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, ImageCondition]:
    """Noisy latents, one t per video, a prompt and the image's condition."""
    generator = torch.Generator().manual_seed(4)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    image = ImageCondition(
        normal(2, shape.condition_channels, FRAMES, ROWS, COLUMNS) if shape.condition_channels else None,
        normal(2, shape.image_tokens or IMAGE_TOKENS, shape.image_dim) if shape.image_dim else None,
    )
    noisy = normal(2, shape.out_channels, FRAMES, ROWS, COLUMNS)
    return noisy, torch.tensor([0.9375, 0.123], dtype=dtype), normal(2, TEXT_LEN, shape.text_dim), image


@contextmanager
def float_keeps_float64() -> Iterator[None]:
    """diffusers' explicit `.float()` casts leave float64 alone, so that a float64 model stays one throughout."""
    original = torch.Tensor.float

    def keep(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else original(self, *args, **kwargs)

    torch.Tensor.float = keep
    try:
        yield
    finally:
        torch.Tensor.float = original


def both(theirs: Any, ours: CausalStudent, dtype: torch.dtype, *, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Velocities of diffusers' model and ours."""
    noisy, t, prompt, image = inputs(ours.shape, dtype)
    frame_times = t[:, None].expand(2, FRAMES).clone()
    timestep = 1000 * t
    if per_frame:
        frame_times[:, 0] = 0  # a known first frame, as Wan2.2's TI2V times its tokens
        timestep = 1000 * frame_times.repeat_interleave(ROWS * COLUMNS // 4, dim=1)
    known = noisy if image.latents is None else torch.cat([noisy, image.latents], dim=1)
    with torch.no_grad(), float_keeps_float64():
        expected = theirs(known, timestep, prompt, encoder_hidden_states_image=_pairs(image.embeds, ours.shape))
        return expected.sample, ours(noisy, frame_times, prompt, image=image)


def _pairs(embeds: Tensor | None, shape: StudentShape) -> Tensor | None:
    """diffusers takes the first and last frame's tokens as two rows of the batch."""
    return embeds.reshape(4, -1, embeds.shape[-1]) if embeds is not None and shape.image_tokens else embeds


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cross_attn_norm": False, "head_dim": 14, "eps": 1e-3},
        {"in_channels": 36, "image_dim": 12},
        {"in_channels": 36},
        {"in_channels": 36, "image_dim": 12, "image_tokens": 8},
    ],
    ids=["t2v", "odd", "i2v", "i2v-without-encoder", "first-and-last-frame"],
)
@pytest.mark.parametrize("per_frame", [False, True])
def test_one_chunk_equals_diffusers(tiny_pair: MakePair, changes: dict[str, Any], per_frame: bool) -> None:
    theirs, ours = tiny_pair(**changes)
    expected, got = both(theirs, ours, torch.float32, per_frame=per_frame)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected, got = both(theirs.double(), ours.double(), torch.float64, per_frame=per_frame)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_original_numerics_differ_from_diffusers_by_its_drift(tiny_pair: MakePair) -> None:
    theirs, ours = tiny_pair()
    for numerics in ("wan", "wan_float64"):
        other = CausalStudent(ours.shape.model_copy(update={"numerics": numerics}))
        other.load_state_dict(ours.state_dict())
        expected, got = both(theirs, other, torch.float32, per_frame=False)
        difference = (got - expected).abs().max()
        assert 0 < difference < 2e-3
        # In float64 nothing but the sinusoid and the tables is left of the difference.
        sinusoid, angles = (each.condition_embedder.sinusoid(torch.tensor([0.999])) for each in (ours, other))
        assert sinusoid.dtype == torch.float32
        assert angles.dtype == torch.float64
        assert 1e-6 < (sinusoid - angles).abs().max() < 2e-4


def test_float64_rotation_agrees_with_the_fused_one(tiny_pair: MakePair) -> None:
    _, ours = tiny_pair()
    outputs = []
    noisy, t, prompt, _ = inputs(ours.shape, torch.float64)
    for numerics in ("wan", "wan_float64"):
        student = CausalStudent(ours.shape.model_copy(update={"numerics": numerics, "chunk_frames": 1}))
        student.load_state_dict(ours.state_dict())
        with torch.no_grad():
            outputs.append(student.double()(noisy, t[:, None].expand(2, FRAMES), prompt, clean=noisy))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
