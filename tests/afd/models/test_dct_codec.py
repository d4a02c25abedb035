"""The weight-free codec: what survives it, and how much it loses."""

import pytest
import torch

from afd.config import PhysicsConstants
from afd.models.dct_codec import DCTCodec
from afd.teachers.physics import simulate_batch, training_prompts


def test_encode_undoes_decode_for_pixels_in_range() -> None:
    codec = DCTCodec()
    latents = 0.05 * torch.randn(2, 12, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    latents[:, 0] += 4.0  # mid grey: no pixel is clamped
    pixels = codec.decode(latents)
    assert pixels.shape == (2, 3, 20, 28, 3)
    assert pixels.min() > 0
    assert pixels.max() < 1
    torch.testing.assert_close(codec.encode(pixels), latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.9, 0.1, 0.3), (0.0, 0.0, 1.0)])
def test_a_constant_colour_is_exact(colour: tuple[float, float, float]) -> None:
    codec = DCTCodec()
    video = torch.tensor(colour).expand(1, 2, 8, 4, 3)
    torch.testing.assert_close(codec.decode(codec.encode(video)), video, rtol=0, atol=1e-6)


def test_smooth_changes_within_a_block_survive() -> None:
    codec = DCTCodec()
    cosine = torch.cos(torch.pi * (2 * torch.arange(4.0) + 1) / 8)  # the first frequency along a block's row
    video = (0.5 + 0.2 * cosine)[None, None, None, :, None].expand(1, 1, 4, 4, 3)
    torch.testing.assert_close(codec.decode(codec.encode(video)), video, rtol=0, atol=1e-6)


def test_the_background_is_the_origin() -> None:
    codec = DCTCodec(mean=0.08)
    assert codec.encode(torch.full((1, 2, 4, 4, 3), 0.08)).abs().max() < 1e-6


def test_blocks_and_frames_do_not_mix() -> None:
    codec = DCTCodec()
    video = torch.full((1, 3, 8, 12, 3), 0.5)
    changed = video.clone()
    changed[0, 1, 5, 9] = 0.9  # frame 1, block row 1, block column 2
    moved = (codec.encode(changed) != codec.encode(video)).any(dim=1)[0]
    assert moved.nonzero().tolist() == [[1, 1, 2]]


def test_loss_on_rendered_balls_is_bounded() -> None:
    codec = DCTCodec()
    constants = PhysicsConstants(fps=8, height=16, width=16, noise=0.0)
    prompts = training_prompts(4)
    video = torch.from_numpy(simulate_batch(prompts, range(4), constants)).float() / 255
    latents = codec.encode(video)
    error = codec.decode(latents) - video
    background = error.square().mean().sqrt() / (video - constants.background).square().mean().sqrt()
    assert 0.01 < background < 0.45, f"relative rms error {background:.3f}"
    assert error.square().mean().sqrt() < 0.06
    assert 0.1 < latents.std() < 3


@pytest.mark.parametrize("shape", [(3, 8, 8, 3), (1, 3, 8, 8, 4), (1, 3, 6, 8, 3), (1, 3, 8, 9, 3)])
def test_wrong_videos_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"video must be \[B, F, 4 \* H, 4 \* W, 3\], got \["):
        DCTCodec().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(12, 3, 2, 2), (1, 16, 3, 2, 2)])
def test_wrong_latents_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must be \[B, 12, F, H, W\], got \["):
        DCTCodec().decode(torch.zeros(shape))


def test_non_contiguous_videos_are_accepted() -> None:
    codec = DCTCodec()
    video = torch.rand(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(codec.encode(video), codec.encode(video.contiguous()))
