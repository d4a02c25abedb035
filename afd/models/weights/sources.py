"""Weight files of every format as one thing: named tensors that are read one at a time, and what the file says.

Nothing here executes what a file holds: safetensors, or torch files with `weights_only=True`, both memory-mapped.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afd.config_file import load_config
from afd.models.weights.names import bare_name, diffusers_name, is_ignored

Which = Literal["average", "raw"]
STUDENT_WEIGHTS = "student.safetensors"
CONFIG = "config.yaml"
LATEST = "latest"
STUDENT_FACTS = "afd_student.json"
# How safetensors names dtypes that weights come in.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DIFFUSERS_STEM = "diffusion_pytorch_model"
# Entries of a checkpoint dictionary that hold the generator's weights.
_RAW = ("generator", "model", "state_dict", "module")
_AVERAGED = ("generator_ema", "ema", "ema_model", "model_ema")
_ADAPTERS = ("generator_lora", "lora")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and dtype, and how to read it: on the CPU, possibly a view of a mapped file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightSource:
    """One file or folder of weights.

    Attributes:
        label: how to call it in messages.
        tensors: by diffusers' names.
        facts: dimensions by `StudentShape`'s names that the file states rather than shows.
        lora_alpha: alpha of its adapters, when the file says.
    """

    label: str
    tensors: Mapping[str, LazyTensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    lora_alpha: float | None = None


def open_source(path: Path, *, which: Which = "average") -> WeightSource:
    """Open student weights of any format; reads headers only.

    Args:
        path: a folder (one of our commits, a run's folder for its newest commit, a diffusers model or pipeline, a peft
            adapter) or a file.
        which: of a file that holds both, the averaged weights (`generator_ema`, a commit's EMA) or the raw ones.
    Raises:
        ValueError: there is nothing that could be a student's weights.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, which)
    if not path.is_file():
        raise ValueError(f"student weights {path} do not exist")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _open_torch(path, which)
    raise ValueError(
        f"student weights {path} must be a .safetensors file, a torch file (.pt, .pth, .bin, .ckpt), "
        f"or a folder, got a {path.suffix or 'nameless'} file"
    )


def _open_folder(folder: Path, which: Which) -> WeightSource:
    for commits in (folder, folder / "checkpoints"):
        if (commits / LATEST).is_file():
            return _open_folder(commits / (commits / LATEST).read_text().strip(), which)
    if (folder / STUDENT_WEIGHTS).is_file():
        return _open_commit(folder, which) if (folder / CONFIG).is_file() else open_source(folder / STUDENT_WEIGHTS)
    if (folder / "adapter_config.json").is_file():
        return _open_adapter(folder)
    if (folder / "transformer" / "config.json").is_file() and not (folder / "config.json").is_file():
        return _open_folder(folder / "transformer", which)
    if (folder / "config.json").is_file():
        return _open_model_folder(folder)
    found = sorted(each.name for each in folder.iterdir())[:8]
    raise ValueError(
        f"student weights {folder} must be a folder with config.json (a diffusers or Wan model), with transformer/ "
        f"(a pipeline), with adapter_config.json (peft), or one of our commits or runs, got a folder with {found}"
    )


def _open_commit(folder: Path, which: Which) -> WeightSource:
    raw = _open_safetensors(folder / STUDENT_WEIGHTS)
    tensors = dict(raw.tensors)
    average = folder / "averages" / "ema.safetensors"
    if which == "average":
        if not average.is_file():
            raise ValueError(f"commit {folder} must hold averages/ema.safetensors, or take init_weights: raw")
        tensors.update(_open_safetensors(average).tensors)
    lora = load_config(folder / CONFIG).student.lora
    return WeightSource(f"commit {folder}", tensors, raw.facts, lora.alpha if lora.rank else None)


def _open_model_folder(folder: Path) -> WeightSource:
    facts = read_model_config(folder / "config.json")
    if (folder / STUDENT_FACTS).is_file():
        facts |= json.loads((folder / STUDENT_FACTS).read_text())["shape"]
    files = _weight_files(folder)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors.update(_open_safetensors(file).tensors)
    return WeightSource(f"student weights {folder}", tensors, facts)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or those named in its index."""
    whole, index = folder / f"{_DIFFUSERS_STEM}.safetensors", folder / f"{_DIFFUSERS_STEM}.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} must hold a weight_map from tensors to files: {error}") from error
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"student weights {folder} lack {len(missing)} of {len(named)} shards of their index: {missing[:3]}; "
                "the download or copy is incomplete"
            )
        return [folder / name for name in named]
    if whole.is_file():
        return [whole]
    found = sorted(each.name for each in folder.iterdir())[:8]
    raise ValueError(f"student weights {folder} must hold {whole.name} or {index.name}, got {found}")


def read_model_config(file: Path) -> dict[str, Any]:
    """Dimensions in a Wan transformer's config.json, diffusers' or the original's, by `StudentShape`'s names.

    Raises:
        ValueError: not JSON, or the configuration of another family.
    """
    try:
        config = json.loads(file.read_text())
        family = config.get("_class_name", "")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} must hold a model's configuration as JSON: {error}") from error
    if family == "WanTransformer3DModel":
        names = {
            "num_heads": "num_attention_heads",
            "head_dim": "attention_head_dim",
            "image_tokens": "pos_embed_seq_len",
            **{name: name for name in ("patch_size", "in_channels", "out_channels", "num_layers", "ffn_dim")},
            **{name: name for name in ("freq_dim", "text_dim", "cross_attn_norm", "eps", "image_dim")},
        }
        if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise ValueError(f"{file}: qk_norm must be rms_norm_across_heads, got {config['qk_norm']!r}")
    elif family in ("WanModel", "CausalWanModel"):
        names = {
            "in_channels": "in_dim",
            "out_channels": "out_dim",
            **{name: name for name in ("num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "text_dim")},
            **{name: name for name in ("patch_size", "cross_attn_norm", "eps")},
        }
    else:
        raise ValueError(
            f"{file} is the configuration of a {family or 'model without _class_name'}, not of a Wan transformer "
            "(WanTransformer3DModel, WanModel, CausalWanModel): wrong family, or the wrong folder of a pipeline"
        )
    return {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}


def _open_adapter(folder: Path) -> WeightSource:
    config = json.loads((folder / "adapter_config.json").read_text())
    unsupported = [
        key for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "lora_bias") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or unsupported:
        raise ValueError(f"adapter {folder} must be plain LoRA, got {config.get('peft_type')} with {unsupported}")
    source = _open_safetensors(folder / "adapter_model.safetensors")
    return WeightSource(f"adapter {folder}", source.tensors, {}, float(config["lora_alpha"]))


def _open_safetensors(path: Path) -> WeightSource:
    try:
        file = safe_open(path, framework="pt").__enter__()
        metadata = file.metadata() or {}
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"student weights {path} must be a safetensors file: {error}") from error
    tensors = {
        name: LazyTensor(tuple(header.get_shape()), DTYPES[header.get_dtype()], lambda name=name: file.get_tensor(name))
        for name, header in headers.items()
    }
    facts = json.loads(metadata["student_shape"]) if "student_shape" in metadata else {}
    alpha = metadata.get("lora_alpha")
    return _renamed(f"student weights {path}", tensors, facts, None if alpha is None else float(alpha))


_NO_TORCH_FILE = "student weights {} must be a torch file of tensors: it is damaged, cut short, or another kind of file"
# What reading bytes that are no pickle ends in, by what the bytes happen to say.
_NOT_A_PICKLE = (
    *(RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError),
    *(AttributeError, AssertionError, OverflowError, struct.error),
)


def _open_torch(path: Path, which: Which) -> WeightSource:
    # Only zip files, which torch has written since 1.6, can be mapped instead of read.
    try:
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise ValueError(_NO_TORCH_FILE.format(path)) from error
        raise ValueError(
            f"student weights {path} hold Python objects beside tensors, which are not loaded: "
            f"{str(error).splitlines()[0]} Save only the tensors, with a program that you trust."
        ) from error
    except _NOT_A_PICKLE as error:
        raise ValueError(_NO_TORCH_FILE.format(path)) from error
    state = _state_dict(path, content, which)
    tensors = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in state.items() if isinstance(t, Tensor)}
    alpha = content.get("lora_alpha")
    return _renamed(f"student weights {path}", tensors, {}, float(alpha) if isinstance(alpha, int | float) else None)


def _state_dict(path: Path, content: Any, which: Which) -> dict[str, Any]:
    """The generator's tensors in a checkpoint dictionary, its adapters among them."""
    if not isinstance(content, Mapping):
        raise ValueError(f"student weights {path} must hold a dictionary of tensors, got {type(content).__name__}")
    if any(isinstance(value, Tensor) and "." in name for name, value in content.items()):
        return dict(content)
    order = _AVERAGED + _RAW if which == "average" else _RAW + _AVERAGED
    state: dict[str, Any] = {}
    for key in order:
        if isinstance(content.get(key), Mapping):
            inner = content[key]
            nested = next((inner[name] for name in _RAW if isinstance(inner.get(name), Mapping)), inner)
            state = dict(nested)
            break
    for key in _ADAPTERS:
        if isinstance(content.get(key), Mapping):
            state |= content[key]
    if not state:
        raise ValueError(
            f"student weights {path} must hold one of {[*_AVERAGED, *_RAW, *_ADAPTERS]}, got {sorted(content)[:8]}"
        )
    return state


def _renamed(
    label: str, tensors: Mapping[str, LazyTensor], facts: Mapping[str, Any], alpha: float | None
) -> WeightSource:
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        new = diffusers_name(name)
        if is_ignored(bare_name(name)):
            continue
        if new in renamed:
            raise ValueError(f"{label} hold {new} twice, once as {name}")
        renamed[new] = tensor
    return WeightSource(label, renamed, facts, alpha)
