"""The shipped text encoder, the latent shapes, and the Wan VAE's border on a tiny random VAE."""

from pathlib import Path

import pytest
import torch

from afd.config import EncodersSection, StudentShape, VideoSection
from afd.models.dct_codec import DCTCodec
from afd.models.encoders import (
    QUICKSTART_ASSETS,
    TextEncoder,
    check_encoders,
    clean_prompt,
    encode_prompts,
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


def test_prompts_are_cleaned_as_wan_cleans_them() -> None:
    assert clean_prompt("  a&amp;lt;b \n\t red  ball ") == "a<b red ball"


def test_prompts_are_encoded_in_batches(text: TextEncoder) -> None:
    prompts = [*PROMPTS, PROMPTS[0]]
    embeds = encode_prompts(EncodersSection(), prompts, batch_size=2)
    torch.testing.assert_close(embeds, text.encode(prompts), rtol=0, atol=1e-5)


def test_a_pipelines_folder_and_its_text_encoder_are_found(tmp_path: Path, text: TextEncoder) -> None:
    """diffusers keeps the tokenizer beside the text encoder, not in it."""
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    for file in (QUICKSTART_ASSETS / "text_encoder").iterdir():
        folder = "tokenizer" if file.name.startswith("tokenizer") else "text_encoder"
        (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model_index.json").write_text("{}")
    expected = text.encode(PROMPTS)
    for path in (tmp_path, tmp_path / "text_encoder"):
        assert torch.equal(TextEncoder(path, text_len=16).encode(PROMPTS), expected)


def test_encoders_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    shape = StudentShape()
    check_encoders(EncodersSection(), shape)
    folder = tmp_path / "text"
    cases = [
        (EncodersSection(), {"text_dim": 48}, "student text_dim must be 32, the text encoder's width, got 48"),
        (EncodersSection(), {"out_channels": 16}, "student out_channels must be 12, the latent channels of codec dct"),
        (EncodersSection(text_len=20), {}, "encoders.text_len must be at most 16, the student's text_len, got 20"),
        (EncodersSection(text_path=folder), {}, "text encoder folder .*text must be a folder, which is missing"),
        (EncodersSection(codec="wan_vae"), {}, "encoders.vae_path must name an AutoencoderKLWan folder"),
        (EncodersSection(codec="wan_vae", vae_path=folder), {}, "encoders.vae_path .*text must be a folder"),
    ]
    for encoders, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            check_encoders(encoders, shape.model_copy(update=changes))


def test_an_incomplete_or_foreign_text_encoder_is_refused(tmp_path: Path) -> None:
    encoders = EncodersSection(text_path=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 32}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a umt5 model, got 't5'"):
        check_encoders(encoders, StudentShape())
    (tmp_path / "config.json").write_text('{"model_type": "umt5", "d_model": 32}')
    with pytest.raises(ValueError, match=r"must hold weights as \*\.safetensors, got none"):
        check_encoders(encoders, StudentShape())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(ValueError, match=r"must hold model-2\.safetensors, named by model\.safetensors\.index\.json"):
        check_encoders(encoders, StudentShape())
