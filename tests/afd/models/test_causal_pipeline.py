"""The exported pipeline with a VAE, a text and an image encoder beside it: pixels as ours, images as diffusers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from afd.config import EncodersSection
from afd.models.encoders import encode_prompts
from afd.models.image_encoder import condition_on, image_tokens, known_latents, pixels_of
from afd.models.student import CausalStudent
from afd.models.wan_vae import WanVAE
from afd.models.weights import save_student
from afd.models.weights.causal_pipeline import CausalWanPipeline
from afd.models.weights.exporting import export_diffusers
from afd.models.weights.loading import open_student
from afd.rollout import SamplerTimes, rollout

pytestmark = pytest.mark.slow  # importing diffusers takes seconds
MakeStudent = Callable[..., CausalStudent]
TIMES = SamplerTimes((1.0, 0.75, 0.25), context_noise=0.1)
SIZE, LATENTS = (32, 48), (3, 4, 6)  # nine frames
WAN: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "text_len": 7, "text_dim": 20}
WAN |= {"chunk_frames": 1, "window_frames": 2, "sink_frames": 1}
I2V, FLF = WAN | {"in_channels": 36, "image_dim": 12}, WAN | {"in_channels": 36, "image_dim": 12, "image_tokens": 10}
PROMPT = "a red   ball&amp;nbsp;falls"


def picture(seed: int) -> Image.Image:
    """A random picture of the video's size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def export(student: CausalStudent, folder: Path, components: Path | None) -> Path:
    """The student as a pipeline's folder."""
    save_student(student, folder / "s.safetensors", dtype=torch.float32, note={})
    file = open_student(folder / "s.safetensors")
    sampling = {"steps": [1000, 750, 250], "first_chunk_steps": None, "shift": 1.0, "context_noise": 0.1}
    export_diffusers(file.source.tensors, file.shape, folder / "out", sampling=sampling, card="", components=components)
    return folder / "out"


def encoders(folder: Path) -> EncodersSection:
    return EncodersSection(codec="wan_vae", vae_path=folder, text_path=folder, image_path=folder, text_len=7)


def noise(rows: int = 1) -> Tensor:
    return torch.randn(rows, TIMES.num_noises, 16, *LATENTS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("shape", "num_images"),
    [(WAN, 0), (WAN, 1), (I2V, 1), (I2V, 2), (FLF, 2), (WAN | {"in_channels": 36}, 1)],
    ids=["t2v", "t2v-first-chunk", "i2v", "i2v-last", "first-and-last-frame", "i2v-without-encoder"],
)
def test_prompts_and_images_become_the_pixels_that_we_sample(
    make_student: MakeStudent, pipeline_folder: Path, tmp_path: Path, shape: dict[str, Any], num_images: int
) -> None:
    from diffusers import DiffusionPipeline

    if num_images and shape is WAN:
        shape = {**WAN, "chunk_frames": 2, "first_chunk_frames": 1}
    student = make_student(**shape).requires_grad_(False).eval()
    out = str(export(student, tmp_path, pipeline_folder))
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(out, custom_pipeline=out)
    pipe: Any = CausalWanPipeline.from_pretrained(out)
    images = [picture(i) for i in range(num_images)]
    given = dict(zip(("image", "last_image"), images, strict=False))
    sizes = {"height": SIZE[0], "width": SIZE[1], "num_frames": 9}
    got = pipe(PROMPT, generator=torch.Generator().manual_seed(3), **sizes, **given).frames
    assert got.shape == (1, 9, *SIZE, 3)
    config, codec = encoders(pipeline_folder), WanVAE(pipeline_folder)
    image, first = condition_on(images, student.shape, codec, config, size=SIZE, num_latent_frames=LATENTS[0])
    embeds = encode_prompts(config, [PROMPT])
    latents = rollout(student, embeds, noise(), TIMES, image=image, first_chunk=first)
    torch.testing.assert_close(torch.from_numpy(got), codec.decode(latents), rtol=0, atol=5e-5)
    if first is not None:
        assert torch.equal(latents[:, :, :1], first)
    if images:
        other = pipe(PROMPT, noise=noise(), image=picture(7), last_image=given.get("last_image"), output_type="latent")
        assert (other.frames - latents).abs().max() > 1e-2
    one = pipe([PROMPT, "a ball"], noise=noise(2), **given, output_type="latent").frames[:1]
    two = pipe("a red ball falls", noise=noise(2)[:1], **given, output_type="latent").frames
    torch.testing.assert_close(one, two, rtol=0, atol=5e-5)


def test_known_latents_and_image_tokens_are_diffusers_own(pipeline_folder: Path) -> None:
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    processor: Any = CLIPImageProcessorPil.from_pretrained(pipeline_folder / "image_processor")
    theirs: Any = WanImageToVideoPipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        scheduler=None,  # pyright: ignore[reportArgumentType]
        vae=AutoencoderKLWan.from_pretrained(pipeline_folder / "vae"),
        image_encoder=CLIPVisionModel.from_pretrained(pipeline_folder / "image_encoder"),
        image_processor=processor,
    )
    codec, images = WanVAE(pipeline_folder), [picture(0), picture(1)]
    for count in (1, 2):
        pixels = [theirs.video_processor.preprocess(each, *SIZE) for each in images[:count]]
        last = pixels[1] if count == 2 else None
        with torch.no_grad():
            _, expected = theirs.prepare_latents(pixels[0], 1, 16, *SIZE, 9, torch.float32, last_image=last)
            tokens = theirs.encode_image(images[:count])
        got = known_latents(codec, [pixels_of(each, SIZE) for each in images[:count]], LATENTS[0])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert expected[:, :4].sum() == (4 if count == 1 else 5) * 24
        got = image_tokens(pipeline_folder, images[:count])
        torch.testing.assert_close(got, tokens.reshape(1, -1, 12), rtol=0, atol=1e-6)


def test_what_is_missing_is_named(make_student: MakeStudent, pipeline_folder: Path, tmp_path: Path) -> None:
    bare: Any = CausalWanPipeline.from_pretrained(export(make_student(**I2V), tmp_path / "i2v", None))
    embeds = torch.zeros(1, 7, 20)
    for arguments, message in [
        ({"prompt": PROMPT}, "no VAE: take output_type"),
        ({"prompt": PROMPT, "output_type": "latent"}, "no text encoder: give prompt_embeds"),
        ({"output_type": "latent"}, "give one of prompt and prompt_embeds"),
        ({"output_type": "pil"}, 'output_type must be "np", "pt" or "latent"'),
        ({"prompt_embeds": embeds, "output_type": "latent"}, "no VAE: give latent_size or noise"),
        (
            {"prompt_embeds": embeds, "noise": noise(), "output_type": "latent"},
            r"give an image, or image_latents \[1, 20, 3, 4, 6\], got None",
        ),
        (
            {"prompt_embeds": embeds, "noise": noise(), "image": picture(0), "output_type": "latent"},
            "no VAE: give image_latents",
        ),
        (
            {"prompt_embeds": embeds, "noise": noise(), "image_latents": torch.zeros(1, 20, 3, 4, 6)}
            | {"output_type": "latent"},
            r"give an image, or image_embeds \[1, tokens, 12\], got None",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            bare(**arguments)
    t2v: Any = CausalWanPipeline.from_pretrained(
        export(make_student(**WAN | {"chunk_frames": 3, "window_frames": 3}), tmp_path / "t2v", pipeline_folder)
    )
    with pytest.raises(ValueError, match="takes one image, and only if its first chunk is one frame"):
        t2v(PROMPT, image=picture(0), height=32, width=48, num_frames=9)
    with pytest.raises(ValueError, match="height and width multiples of 16 and 16, got 9, 40 x 48"):
        t2v(PROMPT, height=40, width=48, num_frames=9)
    with pytest.raises(ValueError, match=r"latent frames must be 3 \+ a multiple of 3, got 4"):
        t2v(PROMPT, height=32, width=48, num_frames=13)
    with pytest.raises(ValueError, match="student text_dim must be 20, the text encoder's width, got 24"):
        export(make_student(**WAN | {"text_dim": 24}), tmp_path / "misfit", pipeline_folder)
    with pytest.raises(ValueError, match="student image_dim must be 12, the image encoder's width, got 8"):
        export(make_student(**I2V | {"image_dim": 8}), tmp_path / "other", pipeline_folder)
