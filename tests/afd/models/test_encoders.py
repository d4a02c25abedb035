"""The shipped text encoder, the latent shapes, and the Wan VAE's border on a tiny random VAE."""

from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import EncodersSection, VideoSection
from afd.models.dct_codec import DCTCodec
from afd.models.encoders import (
    QUICKSTART_ASSETS,
    TextEncoder,
    WanVAE,
    latent_shape,
    load_codec,
    load_text_encoder,
    save_tiny_text_encoder,
    text_encoder_folder,
)
from afd.teachers.physics import training_prompts

PROMPTS = ["a small red ball is dropped", "a large blue ball is thrown to the left at high speed"]


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    """The quick start's encoder."""
    return load_text_encoder(EncodersSection())


def test_embeddings_are_zero_behind_each_prompt(text: TextEncoder) -> None:
    embeds = text.encode(PROMPTS)
    assert embeds.shape == (2, 16, 32)
    assert embeds.dtype == torch.float32
    lengths = [len(prompt.split()) for prompt in PROMPTS]
    for row, length in zip(embeds, lengths, strict=True):
        assert (row[:length].abs().sum(1) > 0).all()
        assert not row[length:].any()


def test_embedding_is_deterministic_and_does_not_depend_on_the_batch(text: TextEncoder) -> None:
    together = text.encode(PROMPTS)
    assert torch.equal(together, text.encode(PROMPTS))
    alone = torch.cat([text.encode([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_every_prompt_of_the_world_fits(text: TextEncoder) -> None:
    embeds = text.encode(training_prompts(8))
    assert embeds.isfinite().all()


def test_an_unknown_word_is_named(text: TextEncoder) -> None:
    with pytest.raises(ValueError, match="a word this text encoder does not know: 'cube' in 'a small red cube is"):
        text.encode([PROMPTS[0], "a small red cube is dropped"])


def test_a_prompt_that_is_too_long_is_refused(text: TextEncoder) -> None:
    with pytest.raises(ValueError, match="prompt must have 1 to 16 tokens, got 17 in"):
        text.encode([" ".join(["ball"] * 17)])


@pytest.mark.parametrize("prompts", [[""], [PROMPTS[0], ""]])
def test_an_empty_prompt_is_refused(text: TextEncoder, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="prompt must have 1 to 16 tokens, got 0 in ''"):
        text.encode(prompts)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json"])
def test_a_folder_without_an_encoder_is_refused(tmp_path: Path, missing: str) -> None:
    present = {"config.json", "tokenizer_config.json"} - {missing}
    (tmp_path / present.pop()).write_text("{}")
    with pytest.raises(ValueError, match=f"must hold {missing}, which is missing"):
        TextEncoder(tmp_path, text_len=16)


def test_a_tiny_encoder_is_a_function_of_its_seed(tmp_path: Path) -> None:
    embeds = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        save_tiny_text_encoder(folder, ["red", "ball", "red"], text_dim=8, seed=seed)
        embeds.append(TextEncoder(folder, text_len=3).encode(["red ball"]))
    assert embeds[0].shape == (1, 3, 8)
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.allclose(embeds[0], embeds[2])


def test_default_and_configured_folders(tmp_path: Path) -> None:
    assert text_encoder_folder(EncodersSection()) == QUICKSTART_ASSETS / "text_encoder"
    assert text_encoder_folder(EncodersSection(text_path=tmp_path)) == tmp_path


def test_latent_shapes_of_both_codecs() -> None:
    video = VideoSection(num_frames=12, height=16, width=24)
    assert latent_shape(EncodersSection(), video) == (12, 12, 4, 6)
    assert latent_shape(EncodersSection(codec="wan_vae"), video) == (16, 12, 2, 3)


@pytest.mark.parametrize(("codec", "stride", "size"), [("dct", 4, (16, 18)), ("wan_vae", 8, (12, 16))])
def test_sizes_must_divide_by_the_stride(codec: str, stride: int, size: tuple[int, int]) -> None:
    encoders = EncodersSection.model_validate({"codec": codec})
    message = f"must be divisible by {stride} for codec {codec}, got {size[0]} x {size[1]}"
    with pytest.raises(ValueError, match=message):
        latent_shape(encoders, VideoSection(height=size[0], width=size[1]))


def test_load_codec_chooses(tmp_path: Path) -> None:
    assert isinstance(load_codec(EncodersSection()), DCTCodec)
    with pytest.raises(ValueError, match=r"encoders\.vae_path must name an AutoencoderKLWan folder"):
        load_codec(EncodersSection(codec="wan_vae"))
    with pytest.raises(ValueError, match=r"must hold config\.json, which is missing"):
        load_codec(EncodersSection(codec="wan_vae", vae_path=tmp_path))


@pytest.mark.slow
def test_wan_vae_normalises_and_keeps_frame_major_pixels(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    mean, std = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=mean, latents_std=std).eval()
    vae.save_pretrained(tmp_path / "vae")
    codec = WanVAE(tmp_path / "vae")
    assert (codec.num_channels, codec.spatial_stride, codec.name) == (4, 8, "wan-vae-vae")
    video = torch.rand(2, 5, 16, 24, 3)
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 2, 2, 3)
    with torch.no_grad():
        raw = vae.encode(video.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
        pixels = vae.decode(raw).sample
    for channel in range(4):
        torch.testing.assert_close(latents[:, channel] * std[channel] + mean[channel], raw[:, channel])
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape
    torch.testing.assert_close(decoded, (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1), rtol=0, atol=1e-5)
