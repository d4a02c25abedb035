"""A given first frame (and last): known latents and CLIP tokens, what an image-to-video student sees of its image.

Leaves out where pictures come from; the student takes the result as `ImageCondition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from afd.config import EncodersSection, StudentShape
from afd.models.conditioning import ImageCondition
from afd.models.encoders import VideoCodec, release_memory
from afd.models.model_files import check_file, check_weights, config_of, model_and_companion

_OWNER = "encoders.image_path"
_MASK_CHANNELS = 4  # of Wan2.1: one per video frame that a latent frame stands for


def image_encoder_folders(path: Path) -> tuple[Path, Path]:
    """(model folder, processor folder): one folder for both, a diffusers pipeline, or its `image_encoder`."""
    return model_and_companion(
        path, model="image_encoder", companion="image_processor", marker="preprocessor_config.json"
    )


def read_image_config(path: Path) -> dict[str, Any]:
    """The image encoder's config.json, its folder checked to be complete; nothing is loaded.

    Raises:
        ValueError: the folder, its config, processor or weights are missing, or it is no CLIP vision model.
    """
    folder, processor = image_encoder_folders(path)
    config = config_of(folder, owner=_OWNER)
    config = config.get("vision_config", config)
    if "hidden_size" not in config or config.get("model_type") != "clip_vision_model":
        raise ValueError(f"{_OWNER} {folder} must hold a clip_vision_model, got {config.get('model_type')!r}")
    check_file(processor, "preprocessor_config.json", owner=_OWNER)
    check_weights(folder, owner=_OWNER)
    return config


def takes_images(shape: StudentShape) -> bool:
    """Whether a student was made for images: channels or keys and values of their own."""
    return bool(shape.condition_channels) or shape.image_dim is not None


def check_images(encoders: EncodersSection, shape: StudentShape, num_images: int) -> None:
    """A student gets the images it needs, and what encodes them is complete; reads config files only.

    Args:
        encoders: the run's.
        shape: the student's.
        num_images: given: none, the first frame, or the first and the last.
    Raises:
        ValueError: the first thing that is missing or does not fit.
    """
    if not takes_images(shape):
        if num_images and (num_images > 1 or shape.first_chunk_frames != 1):
            raise ValueError(
                "a text-to-video student takes one image, and only as a first chunk of one frame "
                f"(student.first_chunk_frames=1), got {num_images} and first_chunk_frames {shape.first_chunk_frames}"
            )
        return
    if shape.condition_channels not in (0, _MASK_CHANNELS + shape.out_channels):
        raise ValueError(
            f"an image-to-video student must read {_MASK_CHANNELS} mask and {shape.out_channels} latent channels "
            f"beside its own {shape.out_channels}, got in_channels {shape.in_channels}"
        )
    if num_images not in ((2,) if shape.image_tokens else (1, 2)):
        wanted = (
            "its first and its last frame" if shape.image_tokens else "the video's first frame (and maybe its last)"
        )
        raise ValueError(f"this image-to-video student needs {wanted} as images, got {num_images}")
    if shape.condition_channels and encoders.codec != "wan_vae":
        raise ValueError(f"encoders.codec must be wan_vae for image channels, got {encoders.codec}")
    if shape.image_dim is None:
        return
    if encoders.image_path is None:
        raise ValueError(f"{_OWNER} must name a CLIP vision encoder's folder for this image-to-video student, got none")
    width = read_image_config(encoders.image_path)["hidden_size"]
    if width != shape.image_dim:
        raise ValueError(f"student image_dim must be {width}, the image encoder's width, got {shape.image_dim}")


def known_latents(codec: VideoCodec, frames: Sequence[Tensor], num_latent_frames: int) -> Tensor:
    """Mask and latents [N, 4 + C, F, H, W] of a video of which the first frame, maybe the last, are known.

    The rest is grey. The mask has a channel per video frame that a latent frame stands for; the first latent frame
    stands for one and repeats it.

    Args:
        codec: with temporal stride 4.
        frames: the first, and maybe the last: [N, height, width, 3] in [0, 1].
        num_latent_frames: F.
    Source: Wan2.1 wan/image2video.py (the procedure).
    """
    first, *last = (frame[:, None] for frame in frames)
    count = codec.num_pixel_frames(num_latent_frames) - len(frames)
    grey = torch.full_like(first, 0.5).expand(-1, count, -1, -1, -1)
    latents = codec.encode(torch.cat([first, grey, *last], dim=1))
    mask = latents.new_zeros(len(latents), codec.temporal_stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return torch.cat([mask, latents], dim=1)


@torch.no_grad()
def image_tokens(path: Path, images: Sequence[Image.Image], *, device: torch.device | str = "cpu") -> Tensor:
    """The encoder's last layer but one, one image's tokens after the other: [1, images x tokens, image_dim] float32.

    The encoder is loaded for it and freed again.

    Raises:
        ValueError: see `read_image_config`.
    """
    read_image_config(path)
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    folder, processor_folder = image_encoder_folders(path)
    processor: Any = CLIPImageProcessorPil.from_pretrained(processor_folder)
    model: Any = CLIPVisionModel.from_pretrained(folder)
    model = model.eval().requires_grad_(False).to(device)
    pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(device)
    tokens = model(pixels, output_hidden_states=True).hidden_states[-2]
    del model
    release_memory()
    return tokens.reshape(1, -1, tokens.shape[-1]).float()


def condition_on(
    images: Sequence[Image.Image],
    shape: StudentShape,
    codec: VideoCodec,
    encoders: EncodersSection,
    *,
    size: tuple[int, int],
    num_latent_frames: int,
    device: torch.device | str = "cpu",
) -> tuple[ImageCondition | None, Tensor | None]:
    """(what the student sees of its images, the given first chunk of a student that takes none).

    Args:
        images: as `check_images` counts them; scaled to the video's size.
        shape: the student's.
        codec, encoders: the run's, checked.
        size: (height, width) of the video in pixels.
        num_latent_frames: F of the video.
        device: of the results.
    """
    if not images:
        return None, None
    frames = [pixels_of(image, size).to(device) for image in images]
    if not takes_images(shape):
        return None, codec.encode(frames[0][:, None])
    latents = known_latents(codec, frames, num_latent_frames) if shape.condition_channels else None
    embeds = None
    if shape.image_dim is not None:
        assert encoders.image_path is not None
        embeds = image_tokens(encoders.image_path, images, device=device)
    return ImageCondition(latents, embeds), None


def pixels_of(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture at a video's (height, width): [1, height, width, 3] in [0, 1]."""
    import numpy as np

    scaled = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 255)[None]
