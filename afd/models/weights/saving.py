"""Writing a student as one safetensors file whose header holds its dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from afd.config import StudentShape
from afd.models.student import CausalStudent


def save_student(student: CausalStudent, path: Path, *, dtype: torch.dtype, note: Mapping[str, str]) -> None:
    """Write weights in `dtype` with the shape and a note (strings) in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in student.state_dict().items()}
    save_file(tensors, path, metadata={"student_shape": student.shape.model_dump_json(), **note})


def read_student_note(path: Path) -> dict[str, str]:
    """The metadata of a student file.

    Raises:
        ValueError: not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"student weights {path} must be a safetensors file: {error}") from error


def stored_shape(path: Path) -> StudentShape:
    """The shape in a student file's header; the file may hold adapters beside the student's own tensors.

    Raises:
        ValueError: not a safetensors file, or one without a student's shape.
    """
    metadata = read_student_note(path)
    if "student_shape" not in metadata:
        raise ValueError(f"student weights {path} must hold `student_shape` in the metadata, got {sorted(metadata)}")
    return StudentShape(**json.loads(metadata["student_shape"]))
