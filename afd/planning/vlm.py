"""What a VLM discriminator costs: parameters counted on the meta device, products listed from its layers.

Parameters and FLOPs are exact (tests); bytes kept for the backward and bytes of decoding are estimates, read from the
layers and unmeasured. Seconds of decoding are not part of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afd.config import RunConfig
from afd.config_file import ConfigError
from afd.models.vlm_builder import ShownVideo, plan_vlm
from afd.models.vlm_discriminator import Vision, add_vlm_lora
from afd.models.vlm_weights import FAMILIES, load_tokenizer, read_vlm_config
from afd.planning.operations import Attention, Matmul, Operation

_VAE_PARAMETERS = 126_892_531  # AutoencoderKLWan 2.1
_DECODED_CHANNELS = 96  # of its widest feature maps at full resolution
_DECODED_FRAMES = 36  # of them alive at once: four tensors of four frames, ten convolutions' two remembered frames


@dataclass(frozen=True)
class Tower:
    """A stack of transformer blocks, for one clip.

    Attributes:
        tokens: vectors it works on.
        dim, ffn_dim, num_layers: its size.
        operations: products and attentions of one pass.
        learns: it has a graph: something in it, or before it, is trained.
    """

    tokens: int
    dim: int
    ffn_dim: int
    num_layers: int
    operations: tuple[Operation, ...]
    learns: bool

    def saved_bytes(self, width: int, *, is_checkpointed: bool) -> int:
        """Bytes kept for the backward, or at work in one block where there is none; an estimate."""
        block = self.tokens * ((12 * self.dim + 4 * self.ffn_dim) * width + 8 * self.dim)
        if not self.learns:
            return block
        inputs = self.num_layers * self.tokens * self.dim * width
        return inputs + block if is_checkpointed else self.num_layers * block


@dataclass(frozen=True)
class VLMPlan:
    """A VLM discriminator as the planner sees it.

    Attributes:
        total, trained: parameters.
        vision, language: its parts.
        is_checkpointed: blocks are computed again in the backward.
        shown_bytes: of a clip's frames, float32.
        decoder_bytes: the codec's weights, held on the device.
        decoding_bytes: at work while clips are decoded; an estimate.
    """

    total: int
    trained: int
    vision: Tower
    language: Tower
    is_checkpointed: bool
    shown_bytes: int
    decoder_bytes: int
    decoding_bytes: int

    def saved_bytes(self, *, clips: int, width: int) -> int:
        """Bytes that a training pass over `clips` clips keeps."""
        towers = sum(each.saved_bytes(width, is_checkpointed=self.is_checkpointed) for each in self.towers)
        return clips * (towers + 2 * self.shown_bytes)

    @property
    def towers(self) -> tuple[Tower, Tower]:
        """Both parts."""
        return self.vision, self.language

    def operations(self, clips: int, *, learns: bool) -> list[Operation]:
        """Products of a pass over `clips` clips in the parts that have a graph, or in those that have none."""
        chosen = [each for tower in self.towers if tower.learns == learns for each in tower.operations]
        return [_times(each, clips) for each in chosen]


def plan_discriminator_vlm(config: RunConfig) -> VLMPlan | None:
    """The plan of a run's VLM discriminator; None for another kind.

    Raises:
        ConfigError: what `plan_vlm` refuses.
    """
    section, video, encoders = config.discriminator.vlm, config.video, config.encoders
    if config.discriminator.kind != "vlm":
        return None
    try:
        shown = plan_vlm(section, encoders, video)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert section.path is not None
    before = section.template.partition("{video}")[0]
    total, trained, vision, language = _count(
        section.path, section.lora_rank, section.vision, (before, section.text_len), shown
    )
    is_vae, width = encoders.codec == "wan_vae", getattr(torch, encoders.vae_dtype).itemsize
    pixels = min(video.height * video.width, encoders.vae_tile**2 if encoders.vae_tile else video.height * video.width)
    return VLMPlan(
        total=total,
        trained=trained,
        vision=vision,
        language=language,
        is_checkpointed=section.gradient_checkpointing,
        shown_bytes=3 * len(shown.frames) * shown.size[0] * shown.size[1] * 4,
        decoder_bytes=is_vae * _VAE_PARAMETERS * width,
        decoding_bytes=is_vae * section.decode_clips * pixels * _DECODED_CHANNELS * _DECODED_FRAMES * width,
    )


@lru_cache
def _count(
    path: Path, rank: int, vision_mode: Vision, text: tuple[str, int], shown: ShownVideo
) -> tuple[int, int, Tower, Tower]:
    """(parameters, trained ones, vision tower, language model), from the model's own classes without weights; `text` is
    what stands before the video, and the tokens behind it."""
    import transformers

    family = FAMILIES[read_vlm_config(path)["model_type"]]
    config: Any = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        vlm: Any = getattr(transformers, family)(config).model
        add_vlm_lora(vlm, rank=rank, alpha=rank, vision=vision_mode)
    words, eyes = config.text_config, config.vision_config
    prefix = load_tokenizer(path)(text[0], add_special_tokens=False)
    sequence = len(prefix["input_ids"]) + shown.num_tokens + text[1] + 3  # around the video, and the score
    patches = shown.num_tokens * eyes.spatial_merge_size**2
    wide = eyes.hidden_size if family.startswith("Qwen2_5") else eyes.embed_dim
    ffn = eyes.intermediate_size if family.startswith("Qwen2_5") else int(wide * eyes.mlp_ratio)
    learns = vision_mode != "frozen"
    convolution = vlm.visual.patch_embed.proj.weight
    products = [
        Matmul("patch_embed", patches, convolution[0].numel(), wide, vision_mode == "full", False, in_block=False)
    ]
    merged = shown.num_tokens
    for name, layer in vlm.visual.named_modules():
        if isinstance(layer, nn.Linear):
            products.append(_product(name, layer, merged if name.startswith("merger") else patches))
    frames, window = len(shown.frames) // eyes.temporal_patch_size, getattr(eyes, "window_size", 0)
    whole = getattr(eyes, "fullatt_block_indexes", range(eyes.depth))
    seen = [patches // frames if i in whole else (window // eyes.patch_size) ** 2 for i in range(eyes.depth)]
    looks = [Attention("vision", patches * min(each, patches // frames), wide) for each in seen]
    vision = Tower(patches, wide, ffn, eyes.depth, (*products, *looks), learns)
    layers = [
        _product(name, layer, sequence)
        for name, layer in vlm.language_model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    reads = [Attention("language", sequence * (sequence + 1) // 2, words.hidden_size)] * words.num_hidden_layers
    own = 2 * words.hidden_size + 1  # the score token and the head
    head = Matmul("head", 1, words.hidden_size, 1, in_block=False)
    language = Tower(
        sequence, words.hidden_size, words.intermediate_size, words.num_hidden_layers, (*layers, *reads, head), True
    )
    parameters = list(vlm.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    return sum(each.numel() for each in parameters) + own, trained + own, vision, language


def _product(name: str, layer: nn.Linear, rows: int) -> Matmul:
    return Matmul(
        name, rows, layer.in_features, layer.out_features, layer.weight.requires_grad, in_block="merger" not in name
    )


def _times(operation: Operation, clips: int) -> Operation:
    if isinstance(operation, Attention):
        return Attention(operation.name, operation.pairs * clips, operation.width, operation.in_block)
    return Matmul(
        operation.name,
        operation.rows * clips,
        operation.inputs,
        operation.outputs,
        operation.is_trained,
        operation.has_input_grad,
        operation.in_block,
    )
