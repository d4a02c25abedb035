"""What does not fit is refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from afd.config import RunConfig, StudentShape
from afd.sampling.checks import check_sampling

SHIPPED = StudentShape()


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ({"in_channels": 20}, {}, "must read 4 mask and 12 latent channels beside its own 12, got in_channels 20"),
        ({"in_channels": 28}, {}, "needs the video's first frame .* as images, got 0"),
        ({"text_dim": 64}, {}, "student text_dim must be 32, the text encoder's width, got 64"),
        ({}, {"video": {"width": 18}}, "must be divisible by 4 for codec dct, got 16 x 18"),
        ({"patch_size": (1, 2, 2)}, {"video": {"height": 20}}, r"the student's patch \[2, 2\], got latents 5 x 4"),
        ({}, {"video": {"num_frames": 2}}, "a multiple of the student's chunk 3, got 2"),
        ({}, {"rollout": {"steps": [500, 500]}}, r"steps must be strictly decreasing .* got \[500, 500\]"),
        ({}, {"encoders": {"text_path": "nowhere"}}, "text encoder folder nowhere must be a folder, which is missing"),
        (
            {"in_channels": 16, "out_channels": 16},
            {"encoders": {"codec": "wan_vae", "vae_path": Path("nowhere")}},
            r"encoders\.vae_path nowhere must be a folder, which is missing",
        ),
    ],
)
def test_misfits_are_named(shape: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(RunConfig(**config), SHIPPED.model_copy(update=shape), is_stream=False)


IMAGES = StudentShape(in_channels=36, out_channels=16, image_dim=8)


@pytest.mark.parametrize(
    ("shape", "encoders", "num_images", "message"),
    [
        (SHIPPED, {}, 1, r"only as a first chunk of one frame .*, got 1 and first_chunk_frames None"),
        (SHIPPED.model_copy(update={"first_chunk_frames": 1}), {}, 2, "takes one image, .* got 2 and"),
        (IMAGES.model_copy(update={"image_tokens": 4}), {}, 1, "needs its first and its last frame as images, got 1"),
        (IMAGES, {}, 1, r"encoders\.codec must be wan_vae for image channels, got dct"),
        (IMAGES, {"codec": "wan_vae"}, 1, r"encoders\.image_path must name a CLIP vision encoder's folder .* got none"),
        (IMAGES, {"codec": "wan_vae", "image_path": "nowhere"}, 1, r"encoders\.image_path nowhere must be a folder"),
    ],
)
def test_images_that_do_not_fit_are_named(
    shape: StudentShape, encoders: dict[str, Any], num_images: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(RunConfig.model_validate({"encoders": encoders}), shape, is_stream=False, num_images=num_images)


def test_a_streams_length_is_its_own() -> None:
    check_sampling(RunConfig(), SHIPPED, is_stream=False)
    check_sampling(RunConfig.model_validate({"video": {"num_frames": 2}}), SHIPPED, is_stream=True)
