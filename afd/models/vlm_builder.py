"""A configured VLM discriminator and its view: what it is shown is decided before anything is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from afd.config import EncodersSection, VideoSection, VLMSection
from afd.models.encoders import VideoCodec, check_codec
from afd.models.vlm_discriminator import VLMDiscriminator, add_vlm_lora
from afd.models.vlm_frames import frame_indices, smart_size
from afd.models.vlm_view import PixelView
from afd.models.vlm_weights import (
    find_videoalign,
    lay_videoalign_over,
    load_tokenizer,
    load_vlm,
    read_vlm_config,
)

_PATCH, _TEMPORAL, _MERGE = 14, 2, 2  # of both families, where config.json leaves them out


@dataclass(frozen=True)
class ShownVideo:
    """What of a clip the VLM sees.

    Attributes:
        frames: indices of decoded frames.
        size: (height, width) after resizing.
        seconds_per_patch: seconds of video between two temporal patches.
        num_tokens: of the video in the language model's sequence.
    """

    frames: tuple[int, ...]
    size: tuple[int, int]
    seconds_per_patch: float
    num_tokens: int


def plan_vlm(section: VLMSection, encoders: EncodersSection, video: VideoSection) -> ShownVideo:
    """Check everything about a VLM discriminator that needs no weights, and decide what it is shown.

    Raises:
        ValueError: naming the setting, what was expected and what came.
    """
    if section.path is None:
        raise ValueError("discriminator.vlm.path must name a Qwen2-VL or Qwen2.5-VL folder for kind vlm, got none")
    vision = read_vlm_config(section.path).get("vision_config", {})
    patch, merge = vision.get("patch_size", _PATCH), vision.get("spatial_merge_size", _MERGE)
    temporal = vision.get("temporal_patch_size", _TEMPORAL)
    if section.init_from is not None:
        saved = find_videoalign(section.init_from)
        if (saved.rank, saved.alpha) != (section.lora_rank, section.lora_alpha):
            raise ValueError(
                f"discriminator.vlm.lora_rank and lora_alpha must be {saved.rank} and {saved.alpha}, those of "
                f"{section.init_from}, got {section.lora_rank} and {section.lora_alpha}"
            )
    num_frames = 1 + check_codec(encoders) * (video.num_frames - 1)
    frames = frame_indices(
        num_frames, video_fps=video.fps, fps=section.fps, num_frames=section.num_frames, multiple=temporal
    )
    size = smart_size(
        video.height,
        video.width,
        factor=patch * merge,
        min_pixels=section.min_pixels,
        max_pixels=section.max_pixels,
    )
    shown_fps = len(frames) / (num_frames / video.fps)
    num_tokens = len(frames) // temporal * size[0] * size[1] // (patch * merge) ** 2
    return ShownVideo(frames, size, temporal / shown_fps, num_tokens)


def build_vlm_discriminator(section: VLMSection, shown: ShownVideo, *, dtype: torch.dtype) -> VLMDiscriminator:
    """Load a VLM, give it adapters, and lay a VideoAlign checkpoint over it where one is named.

    Args:
        section: checked by `plan_vlm`.
        shown: what that returned.
        dtype: of all weights; the engine's.
    Raises:
        ValueError: files are damaged or do not fit each other.
    """
    assert section.path is not None
    vlm, tokenizer = load_vlm(section.path, dtype=dtype), load_tokenizer(section.path)
    prefix: list[int] = tokenizer(section.template.partition("{video}")[0], add_special_tokens=False)["input_ids"]
    discriminator = VLMDiscriminator(
        vlm, prefix=prefix, positions=section.positions, seconds_per_patch=shown.seconds_per_patch
    )
    add_vlm_lora(vlm, rank=section.lora_rank, alpha=section.lora_alpha, vision=section.vision)
    if section.init_from is not None:
        checkpoint = find_videoalign(section.init_from)
        lay_videoalign_over(discriminator, checkpoint, dimension=section.dimension, vocabulary=len(tokenizer))
    if section.gradient_checkpointing:
        with warnings.catch_warnings():  # its new name comes with transformers 5.2x
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
            discriminator.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    return discriminator.train()


def build_pixel_view(section: VLMSection, shown: ShownVideo, codec: VideoCodec) -> PixelView:
    """The view of a VLM discriminator."""
    assert section.path is not None
    return PixelView(
        codec,
        load_tokenizer(section.path),
        template=section.template,
        frames=shown.frames,
        size=shown.size,
        text_len=section.text_len,
        decode_clips=section.decode_clips,
        decode_frames=section.decode_frames,
    )
