"""Student weights out: a diffusers folder that samples causally, and the original names for the peers' code.

Written tensor by tensor; nothing is unpickled and no device is needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.config import EncodersSection, StudentShape
from afd.models.encoders import check_encoders
from afd.models.image_encoder import read_image_config
from afd.models.weights.names import original_name
from afd.models.weights.sources import STUDENT_FACTS, LazyTensor
from afd.models.weights.streaming import split_shards, write_tensors

logger = logging.getLogger(__name__)

PIPELINE_CLASS = "CausalWanPipeline"
PIPELINE_FILE = Path(__file__).with_name("causal_pipeline.py")
COMPONENTS = ("vae", "text_encoder", "tokenizer")
IMAGE_COMPONENTS = ("image_encoder", "image_processor")
_STEM = "diffusion_pytorch_model"
_SHARD_BYTES = 5 * 10**9


def export_diffusers(
    tensors: Mapping[str, LazyTensor],
    shape: StudentShape,
    folder: Path,
    *,
    sampling: Mapping[str, Any],
    card: str,
    dtype: torch.dtype | None = None,
    components: Path | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a folder that diffusers loads as a model and as a causally sampling pipeline.

    `WanTransformer3DModel.from_pretrained(folder)` and `(folder, subfolder="transformer")` read the weights,
    `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` samples.

    Args:
        tensors: by diffusers' names, adapters merged or left out.
        shape: the student's dimensions.
        folder: to write; must not exist or be empty.
        sampling: the sampler's `steps`, `first_chunk_steps`, `shift` and `context_noise`.
        card: text of README.md.
        dtype: of the written weights; None keeps them bit by bit.
        components: a diffusers pipeline folder whose VAE, text encoder and tokenizer are copied along, and for students
            with an image embedder its image encoder and processor.
        max_shard_bytes: of one file.
    Raises:
        ValueError: the folder holds something, or `components` lacks a component or has one that does not fit.
    """
    check_empty(folder)
    found = {} if components is None else _find_components(components, shape)
    model = folder / "transformer"
    model.mkdir(parents=True, exist_ok=True)
    config = json.dumps(diffusers_config(shape), indent=2) + "\n"
    weight_map, total = _write_shards(tensors, model, dtype, max_shard_bytes)
    for root in (model, folder):
        (root / "config.json").write_text(config)
        (root / STUDENT_FACTS).write_text(json.dumps({"shape": _own_shape(shape)}, indent=2) + "\n")
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (root / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in sorted(set(weight_map.values())):
        _link(model / name, folder / name)
    for name in found:
        shutil.copytree(found[name], folder / name)
    (folder / "model_index.json").write_text(
        json.dumps(_model_index(components, found, shape, sampling), indent=2) + "\n"
    )
    shutil.copyfile(PIPELINE_FILE, folder / "pipeline.py")
    (folder / "README.md").write_text(card)


def _link(file: Path, link: Path) -> None:
    """The same file under a second name (diffusers allows no paths in an index); a copy where links are impossible."""
    try:
        os.link(file, link)
    except OSError as error:
        logger.warning("%s is a copy of %s, which doubles the folder's size: %s", link.name, file, error.strerror)
        shutil.copyfile(file, link)


def check_empty(folder: Path) -> None:
    """Refuse to write among other files.

    Raises:
        ValueError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} must be a new or empty folder")


def diffusers_config(shape: StudentShape) -> dict[str, Any]:
    """config.json of the WanTransformer3DModel with a student's dimensions."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "added_kv_proj_dim": shape.dim if shape.image_dim else None,
        "attention_head_dim": shape.head_dim,
        "cross_attn_norm": shape.cross_attn_norm,
        "eps": shape.eps,
        "ffn_dim": shape.ffn_dim,
        "freq_dim": shape.freq_dim,
        "image_dim": shape.image_dim,
        "in_channels": shape.in_channels,
        "num_attention_heads": shape.num_heads,
        "num_layers": shape.num_layers,
        "out_channels": shape.out_channels,
        "patch_size": list(shape.patch_size),
        "pos_embed_seq_len": shape.image_tokens,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": shape.text_dim,
    }


def _own_shape(shape: StudentShape) -> dict[str, Any]:
    return shape.model_copy(update={"attention_impl": None}).model_dump(mode="json")


def _write_shards(
    tensors: Mapping[str, LazyTensor], folder: Path, dtype: torch.dtype | None, max_bytes: int
) -> tuple[dict[str, str], int]:
    """Write numbered shards, or one file; (tensor to file, bytes)."""
    shards = split_shards(tensors, max_bytes, dtype=dtype)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        total += write_tensors(shard, folder / f"{_STEM}{part}.safetensors", dtype=dtype)
        weight_map.update(dict.fromkeys(shard, f"{_STEM}{part}.safetensors"))
    return weight_map, total


def _find_components(folder: Path, shape: StudentShape) -> dict[str, Path]:
    names = COMPONENTS + (IMAGE_COMPONENTS if shape.image_dim else ())
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing or not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--components {folder} must be a diffusers pipeline folder with model_index.json and "
            f"{', '.join(names)}, missing {missing or ['model_index.json']}"
        )
    encoders = EncodersSection(codec="wan_vae", vae_path=folder, text_path=folder, text_len=shape.text_len)
    check_encoders(encoders, shape)
    if shape.image_dim and (width := read_image_config(folder)["hidden_size"]) != shape.image_dim:
        raise ValueError(f"student image_dim must be {width}, the image encoder's width, got {shape.image_dim}")
    return {name: folder / name for name in names}


def _model_index(
    components: Path | None, found: Mapping[str, Path], shape: StudentShape, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    theirs = json.loads((components / "model_index.json").read_text()) if components is not None else {}
    own = ("chunk_frames", "first_chunk_frames", "window_frames", "sink_frames", "text_len", "numerics")
    return {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": importlib.metadata.version("diffusers"),
        **{name: theirs[name] if name in found else [None, None] for name in COMPONENTS + IMAGE_COMPONENTS},
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "sampling": {**{name: getattr(shape, name) for name in own}, **sampling},
    }


def export_adapter(
    adapters: Mapping[str, LazyTensor], folder: Path, *, alpha: float, dtype: torch.dtype | None = None
) -> None:
    """Write adapters as a peft folder: `PeftModel.from_pretrained(transformer, folder)` puts them on.

    Args:
        adapters: `<layer>.lora_A` and `<layer>.lora_B`, as `split_adapters` gives them.
        folder: to write.
        alpha: the update is alpha / r B A.
        dtype: of the written weights; None keeps them.
    Raises:
        ValueError: adapters of several ranks, which one peft configuration cannot say.
    """
    downs = {name: tensor for name, tensor in adapters.items() if name.endswith(".lora_A")}
    ranks = {tensor.shape[0] for tensor in downs.values()}
    if len(ranks) != 1:
        raise ValueError(f"adapters must have one rank to be written for peft, got {sorted(ranks)}: merge them instead")
    named = {
        f"base_model.model.{name}.weight": tensor for name, tensor in adapters.items() if not name.endswith(".alpha")
    }
    write_tensors(named, folder / "adapter_model.safetensors", dtype=dtype)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": ranks.pop(),
        "target_modules": sorted(name.removesuffix(".lora_A") for name in downs),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def export_original(
    states: Mapping[str, Mapping[str, LazyTensor]], file: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write the original Wan names: a `.pt` that the peers' inference code loads, or a bare safetensors file.

    Args:
        states: `generator` and `generator_ema`, the averaged weights; one and the same mapping is written once.
        file: `.pt`: `{"generator": {"model.<name>": tensor}, "generator_ema": ...}`; `.safetensors`: the averaged
            weights alone, names without `model.`, streamed. The `.pt` takes the model's size in memory.
        dtype: of the written weights; None keeps them bit by bit.
    Raises:
        ValueError: another kind of file.
    """
    if file.suffix == ".safetensors":
        renamed = {original_name(name): tensor for name, tensor in states["generator_ema"].items()}
        write_tensors(renamed, file, dtype=dtype)
        return
    if file.suffix != ".pt":
        raise ValueError(f"--out must end in .pt or .safetensors for the original format, got {file.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    written: dict[int, dict[str, Tensor]] = {}
    for state in states.values():
        if id(state) not in written:
            # Cloned: torch.save writes whole storages, and a mapped tensor's storage is its file's.
            written[id(state)] = {
                f"model.{original_name(name)}": tensor.read().detach().to(dtype=dtype, copy=True).clone()
                for name, tensor in state.items()
            }
    temporary = file.with_name(f"{file.name}.tmp")
    torch.save({key: written[id(state)] for key, state in states.items()}, temporary)
    temporary.replace(file)
