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
        ({"in_channels": 20}, {}, "sampling needs a text-to-video student, in_channels = out_channels, got 20 and 12"),
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


def test_a_streams_length_is_its_own() -> None:
    check_sampling(RunConfig(), SHIPPED, is_stream=False)
    check_sampling(RunConfig.model_validate({"video": {"num_frames": 2}}), SHIPPED, is_stream=True)
