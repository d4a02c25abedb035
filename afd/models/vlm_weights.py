"""Files to a VLM discriminator: plain Qwen2-VL and Qwen2.5-VL folders, and VideoAlign checkpoints laid over them.

VideoAlign saves a peft model of transformers 4.4x: `base_model.model.model.layers.*` is today's
`language_model.layers.*`, `base_model.model.visual.*` today's `visual.*`, and `base_model.model.rm_head.weight`
[dimensions, D] its head. Nothing is guessed: every tensor of a checkpoint must find its place, and every adapter its
tensor.
Source: KwaiVGI/VideoAlign utils.py, trainer.py, train_reward.py (file names and key names).
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from afd.models.model_files import check_file, check_weights, config_of
from afd.models.vlm_discriminator import VLMDiscriminator

FAMILIES = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
DIMENSIONS = ("VQ", "MQ", "TA")  # rows of the head, and the order of the reward tokens behind the vocabulary
_OWNER = "discriminator.vlm.path"
_PREFIX = "base_model.model."
_FULL, _ADAPTER, _OTHERS = "model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth"
_EMBEDDING = "language_model.embed_tokens.weight"


def read_vlm_config(folder: Path) -> dict[str, Any]:
    """A VLM folder's config.json, the folder checked to be complete; nothing is loaded.

    Raises:
        ValueError: the folder, its config, tokenizer or weights are missing, or it is of another family.
    """
    config = config_of(folder, owner=_OWNER)
    if config.get("model_type") not in FAMILIES:
        raise ValueError(f"{_OWNER} {folder} must hold one of {sorted(FAMILIES)}, got {config.get('model_type')!r}")
    check_file(folder, "tokenizer_config.json", owner=_OWNER)
    check_weights(folder, owner=_OWNER)
    return config


def load_tokenizer(folder: Path) -> Any:
    """The VLM's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_vlm(folder: Path, *, dtype: torch.dtype) -> nn.Module:
    """Vision tower and language model of a plain folder, without the word head.

    Raises:
        ValueError: the folder is not complete, or its tensors are not exactly the model's.
    """
    family = FAMILIES[read_vlm_config(folder)["model_type"]]
    import transformers

    loader: Any = getattr(transformers, family)
    whole, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[kind]))
        if names:
            raise ValueError(f"{_OWNER} {folder} has {len(names)} {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    vlm: nn.Module = whole.model
    return vlm


@dataclass(frozen=True)
class VideoAlign:
    """A VideoAlign checkpoint's files and what its model_config.json says.

    Attributes:
        folder: checkpoint-N.
        rank, alpha: of its adapters.
        has_tokens: its scores stand on reward tokens behind the vocabulary.
        is_full: one model.pth with every weight, or adapters and the other trained weights in two files.
    """

    folder: Path
    rank: int
    alpha: int
    has_tokens: bool
    is_full: bool


def find_videoalign(path: Path) -> VideoAlign:
    """Find a checkpoint's files (the newest checkpoint-N of a folder) and read its model_config.json.

    Raises:
        ValueError: something is missing, or it was trained without adapters.
    """
    owner = "discriminator.vlm.init_from"
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2] or "0"))
    folder = checkpoints[-1] if checkpoints else path
    configs = [each / "model_config.json" for each in (path, folder.parent) if (each / "model_config.json").is_file()]
    if not configs:
        raise ValueError(f"{owner} {path} must hold model_config.json of VideoAlign, which is missing")
    try:
        config = json.loads(configs[0].read_text())
        lora, model = config["peft_lora_config"], config["model_config"]
        is_adapted, rank, alpha = bool(lora["lora_enable"]), int(lora["lora_r"]), int(lora["lora_alpha"])
        has_tokens = bool(model["use_special_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{configs[0]} must be VideoAlign's model_config.json, got {error!r}") from error
    if not is_adapted:
        raise ValueError(f"{configs[0]} must have lora_enable: only checkpoints with adapters are supported, got false")
    is_full = (folder / _FULL).is_file()
    if not is_full and not ((folder / _ADAPTER).is_file() and (folder / _OTHERS).is_file()):
        raise ValueError(f"{owner} {folder} must hold {_FULL}, or {_ADAPTER} and {_OTHERS}, got neither")
    return VideoAlign(folder, rank, alpha, has_tokens, is_full)


def current_name(name: str) -> str:
    """Today's name of a VideoAlign tensor, without `base_layer`; `head.weight` for its rm_head, "" for the word head.

    Raises:
        ValueError: the name does not come from a peft model.
    """
    if not name.startswith(_PREFIX):
        raise ValueError(f"VideoAlign names begin with {_PREFIX!r}, got {name!r}")
    bare = name.removeprefix(_PREFIX)
    for side in ("lora_A", "lora_B"):
        bare = bare.replace(f".{side}.weight", f".{side}.default.weight")
    bare = bare.replace(".base_layer.", ".")
    if bare.startswith("lm_head."):
        return ""
    if bare.startswith("rm_head."):
        return f"head.{bare.removeprefix('rm_head.')}"
    if bare.startswith("visual."):
        return bare
    for own in ("model.visual.", "model.language_model."):  # saved by a later transformers
        if bare.startswith(own):
            return bare.removeprefix("model.")
    return f"language_model.{bare.removeprefix('model.')}" if bare.startswith("model.") else bare


def read_videoalign(checkpoint: VideoAlign) -> dict[str, Tensor]:
    """All tensors of a checkpoint by today's names, the word head left out.

    Raises:
        ValueError: a file cannot be read, holds something else than tensors, or names that are not VideoAlign's.
    """
    names = (_FULL,) if checkpoint.is_full else (_ADAPTER, _OTHERS)
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = checkpoint.folder / name
        try:
            if name == _ADAPTER:
                state: Any = load_file(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is no readable VideoAlign file: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
            raise ValueError(f"{file} must hold tensors by name, got {type(state).__name__}")
        try:
            tensors |= {current_name(key): value for key, value in state.items()}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    tensors.pop("", None)
    return tensors


@torch.no_grad()
def lay_videoalign_over(
    discriminator: VLMDiscriminator, checkpoint: VideoAlign, *, dimension: str, vocabulary: int
) -> None:
    """Copy a checkpoint into a discriminator with adapters of its rank: weights, adapters, score token and head.

    Args:
        discriminator: its vlm has been given adapters.
        checkpoint: from `find_videoalign`.
        dimension: of `DIMENSIONS`.
        vocabulary: length of the plain model's tokenizer; the reward tokens come behind it.
    Raises:
        ValueError: a tensor has no place or another shape, or something that must be there is not.
    """
    tensors = read_videoalign(checkpoint)
    where = f"VideoAlign checkpoint {checkpoint.folder}"
    if "head.weight" not in tensors:
        raise ValueError(f"{where} must hold rm_head.weight, which is missing")
    row = DIMENSIONS.index(dimension)
    head = tensors.pop("head.weight")
    width = discriminator.head.in_features
    if tuple(head.shape) not in ((len(DIMENSIONS), width), (1, width)):
        raise ValueError(f"{where}: rm_head.weight must be [{len(DIMENSIONS)} or 1, {width}], got {list(head.shape)}")
    places: dict[str, nn.Parameter] = {
        name.replace(".base_layer.", "."): each for name, each in discriminator.vlm.named_parameters()
    }
    embedding = tensors.pop(_EMBEDDING, None)
    _check_places(tensors, places, checkpoint, has_embedding=embedding is not None, where=where)
    if embedding is not None:
        rows = vocabulary + (len(DIMENSIONS) if checkpoint.has_tokens else 0)
        if embedding.shape[1] != width or (checkpoint.has_tokens and len(embedding) != rows):
            raise ValueError(f"{where}: embed_tokens.weight must be [{rows}, {width}], got {list(embedding.shape)}")
        places[_EMBEDDING][:vocabulary].copy_(embedding[:vocabulary])
        if checkpoint.has_tokens:
            discriminator.score_token.copy_(embedding[vocabulary + row])
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    discriminator.head.weight.copy_(head[row if len(head) > 1 else 0][None])


def _check_places(
    tensors: dict[str, Tensor], places: dict[str, nn.Parameter], checkpoint: VideoAlign, *, has_embedding: bool,
    where: str,
) -> None:  # fmt: skip
    unknown = sorted(tensors.keys() - places.keys())
    if unknown:
        hint = "; for adapters on the vision tower set discriminator.vlm.vision=lora" if "visual" in unknown[0] else ""
        raise ValueError(f"{where} has {len(unknown)} tensors without a place: {', '.join(unknown[:3])}{hint}")
    wrong = [name for name in sorted(tensors) if tensors[name].shape != places[name].shape]
    if wrong:
        got, expected = list(tensors[wrong[0]].shape), list(places[wrong[0]].shape)
        raise ValueError(
            f"{where} does not fit discriminator.vlm.path: {wrong[0]} must be {expected}, got {got} "
            f"({len(wrong)} tensors differ)"
        )
    needed = {name for name in places if checkpoint.is_full or ".lora_" in name}
    if any(name.startswith("visual.") and ".lora_" in name for name in tensors) is False:
        needed = {name for name in needed if not (name.startswith("visual.") and ".lora_" in name)}
    missing = sorted(needed - tensors.keys() - {_EMBEDDING})
    if (checkpoint.is_full or checkpoint.has_tokens) and not has_embedding:
        missing.append(_EMBEDDING)
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} tensors: {', '.join(missing[:3])}")
