"""A discriminator on a vision-language model: where its weights come from, what is trained, what it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from afd.config.section import Positive, Section

_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{video}"
    "Text prompt of this video: {prompt}\n"
    "How real is the video, how natural is its motion, and how well does it follow its prompt?"
    "<|im_end|>\n<|im_start|>assistant\n"
)


class VLMSection(Section):
    """Read when discriminator.kind is vlm: Qwen2-VL or Qwen2.5-VL with a score token after the prompt."""

    path: Path | None = None
    """Folder of the model as `save_pretrained` writes it: config.json, safetensors weights, tokenizer."""
    init_from: Path | None = None
    """VideoAlign checkpoint laid over it: a folder with model_config.json and checkpoint-N, or one checkpoint-N beside
    the model_config.json. None starts with new adapters and a head that scores 0."""
    dimension: Literal["VQ", "MQ", "TA"] = "MQ"
    """VideoAlign's score that the head and the score token start from: visual quality, motion quality, alignment."""
    lora_rank: Positive = 64
    """Rank of the adapters on all linear layers of the language model (VideoAlign: 64)."""
    lora_alpha: Positive = 128
    """The adapters' update is lora_alpha / lora_rank times B A (VideoAlign: 128)."""
    vision: Literal["frozen", "lora", "full"] = "frozen"
    """The vision tower: left alone, given adapters of the same rank, or trained whole (VideoAlign: whole)."""
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames per second of video that it is shown, first and last frame included (VideoAlign: 2)."""
    num_frames: Positive | None = None
    """Frames it is shown, in place of fps."""
    min_pixels: Positive = 128 * 28 * 28
    """Frames with fewer pixels are enlarged (Qwen's rule for videos)."""
    max_pixels: Positive = 200_704
    """Frames with more pixels are shrunk (VideoAlign: 448 x 448)."""
    template: str = _TEMPLATE
    """What the model reads, with {video} and {prompt}; the score token follows its end."""
    text_len: Positive = 768
    """Tokens that the text behind the video may have."""
    positions: Literal["multimodal", "sequential"] = "multimodal"
    """Rotary positions: the model's own (time, row, column), or 1, 2, 3, ... as VideoAlign was trained."""
    decode_clips: Positive = 1
    """Clips decoded together."""
    decode_frames: Positive = 3
    """Latent frames decoded at a time; pixels that are not shown are dropped before the next ones."""
    gradient_checkpointing: bool = True
    """Recompute the model's blocks in the backward."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        head, _, tail = self.template.partition("{video}")
        if "{prompt}" in head or tail.count("{prompt}") != 1 or "{video}" in tail:
            raise ValueError(f"template must hold {{video}} once and {{prompt}} once behind it, got {self.template!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must be at most max_pixels {self.max_pixels}, got {self.min_pixels}")
        return self
