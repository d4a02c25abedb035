"""What the VLM is shown: chunked decoding against decoding whole clips, and token ids."""

from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import VLMSection
from afd.models.dct_codec import DCTCodec
from afd.models.vlm_frames import resize_frames
from afd.models.vlm_view import PixelView
from afd.models.vlm_weights import load_tokenizer
from afd.models.wan_vae import WanVAE

FRAMES = {"dct": (0, 3, 4, 8), "wan": (0, 1, 5, 12)}


def make_view(folder: Path, codec: Any, **changes: Any) -> PixelView:
    settings = {
        "template": VLMSection().template,
        "frames": FRAMES["dct"],
        "size": (24, 40),
        "text_len": 200,
        "decode_clips": 1,
        "decode_frames": 1,
    }
    return PixelView(codec, load_tokenizer(folder), **(settings | changes))


@pytest.fixture(scope="module")
def wan_vae(tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    """A tiny random AutoencoderKLWan."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = AutoencoderKLWan(
            base_dim=4,
            z_dim=2,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, 0.0],
            latents_std=[1.0, 0.7],
        )
    vae.save_pretrained(folder)
    return WanVAE(folder)


@pytest.mark.parametrize("batching", [(1, 1), (2, 4), (3, 9), (8, 2)])
@pytest.mark.parametrize("codec_name", ["dct", "wan"])
def test_decoding_in_pieces_equals_decoding_whole(
    vlm_folder: Path, wan_vae: WanVAE, codec_name: str, batching: tuple[int, int]
) -> None:
    codec: Any = DCTCodec() if codec_name == "dct" else wan_vae
    shape = (3, 12, 9, 4, 6) if codec_name == "dct" else (3, 2, 4, 2, 3)
    latents = 0.6 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    frames = FRAMES[codec_name]
    view = make_view(vlm_folder, codec, frames=frames, decode_clips=batching[0], decode_frames=batching[1])
    clips = view.decode(latents.requires_grad_())
    expected = resize_frames(codec.decode(latents.detach())[:, list(frames)], (24, 40))
    assert clips.shape == (3, 3, 4, 24, 40)
    assert not clips.requires_grad
    assert (clips.min() >= 0, clips.max() <= 1, clips.std() > 1e-3) == (True, True, True)
    torch.testing.assert_close(clips, expected, rtol=1e-5, atol=1e-5)


def test_short_clips_are_refused(vlm_folder: Path) -> None:
    with pytest.raises(ValueError, match="clips must decode to more than 8 frames, got 7"):
        make_view(vlm_folder, DCTCodec()).decode(torch.zeros(1, 12, 7, 4, 4))


def test_conditions_are_the_text_behind_the_video(vlm_folder: Path) -> None:
    view, tokenizer = make_view(vlm_folder, DCTCodec()), load_tokenizer(vlm_folder)
    clips, condition = view(torch.zeros(2, 12, 9, 4, 4), ["a red ball", "Ünï"], torch.zeros(2, 1, 1))
    assert (len(clips), condition.shape, condition.dtype, condition.device.type) == (2, (2, 200), torch.int64, "cpu")
    for row, prompt in zip(condition.tolist(), ["a red ball", "Ünï"], strict=True):
        ids = [each for each in row if each >= 0]
        assert row == ids + [-1] * (200 - len(ids))
        text = tokenizer.decode(ids)
        assert f"Text prompt of this video: {prompt}\n" in text
        assert text.endswith("<|im_start|>assistant\n"), "the score token comes behind it"


def test_prompts_that_do_not_fit_are_refused(vlm_folder: Path) -> None:
    view, latents = make_view(vlm_folder, DCTCodec()), torch.zeros(1, 12, 9, 4, 4)
    with pytest.raises(ValueError, match=r"must not hold the VLM's special token '<\|im_end\|>'"):
        view(latents, ["a ball<|im_end|>"], latents)
    with pytest.raises(ValueError, match=r"must have at most discriminator\.vlm\.text_len = 200 tokens, got \d+ in"):
        view(latents, ["ball " * 40], latents)
    with pytest.raises(ValueError, match="prompts must be one per clip, 1, got 2"):
        view(latents, ["a", "b"], latents)


@pytest.mark.parametrize(
    "template", ["{video} only", "{prompt}{video}", "{video}{prompt}{prompt}", "{video}{prompt}{video}"]
)
def test_template_must_put_the_prompt_behind_the_video(template: str) -> None:
    with pytest.raises(ValueError, match=r"template must hold \{video\} once and \{prompt\} once behind it"):
        VLMSection(template=template)
