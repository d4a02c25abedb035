"""What a folder written by `save_pretrained` must hold, checked before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def config_of(folder: Path, *, owner: str) -> dict[str, Any]:
    """A folder's config.json.

    Args:
        folder: of a model.
        owner: what to call it in errors, e.g. the setting that names it.
    Raises:
        ValueError: there is no such folder, no config.json in it, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise ValueError(f"{owner} {folder} must be a folder, which is missing")
    check_file(folder, "config.json", owner=owner)
    return _object(folder / "config.json")


def check_file(folder: Path, name: str, *, owner: str) -> None:
    """A folder holds a file of this name.

    Raises:
        ValueError: it does not.
    """
    if not (folder / name).is_file():
        raise ValueError(f"{owner} {folder} must hold {name}, which is missing")


def model_and_companion(path: Path, *, model: str, companion: str, marker: str) -> tuple[Path, Path]:
    """Where a model and what goes with it lie: one folder for both, a diffusers pipeline, or its part.

    Args:
        path: as the user gave it.
        model: the model's folder in a pipeline.
        companion: the folder of its tokenizer or processor, beside it.
        marker: the companion's file; in the model's own folder it wins over the folder beside.
    """
    own = path / model if (path / "model_index.json").is_file() else path
    beside = own.parent / companion
    return own, beside if beside.is_dir() and not (own / marker).is_file() else own


def check_weights(folder: Path, *, owner: str) -> None:
    """There are safetensors weights, and every shard that an index names.

    Raises:
        ValueError: naming what is missing.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for shard in sorted(set(_object(index).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                raise ValueError(f"{owner} {folder} must hold {shard}, named by {index.name}, which is missing")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{owner} {folder} must hold weights as *.safetensors, got none")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
