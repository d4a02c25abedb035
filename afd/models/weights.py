"""Names and files of student weights: the original Wan names, diffusers' names, and safetensors with its config.

Ours are diffusers' names. A student file is one safetensors file whose metadata holds the `StudentShape` as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afd.config import StudentShape
from afd.models.student import CausalStudent

_PREFIXES = ("model._fsdp_wrapped_module.", "_fsdp_wrapped_module.", "model.")
_RENAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"^(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"^(blocks\.\d+)\.self_attn\.norm_", r"\1.attn1.norm_"),
    (r"^(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"^(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"^(blocks\.\d+)\.cross_attn\.norm_", r"\1.attn2.norm_"),
)


def diffusers_name(original: str) -> str:
    """Rename one parameter of the original Wan code (wrappers' prefixes stripped) to diffusers' name."""
    for prefix in _PREFIXES:
        original = original.removeprefix(prefix)
    for pattern, replacement in _RENAMES:
        renamed, count = re.subn(pattern, replacement, original)
        if count:
            return renamed
    return original


def check_names_and_shapes(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], *, source: str) -> None:
    """Every tensor accounted for, by name and shape.

    Raises:
        ValueError: naming the first mismatches.
    """
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not a parameter of the model" for name in got if name not in expected]
    problems += [
        f"{name} must be {list(expected[name].shape)}, got {list(got[name].shape)}"
        for name in expected
        if name in got and expected[name].shape != got[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")


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


def read_student_shape(path: Path) -> StudentShape:
    """The shape stored in a student file.

    Raises:
        ValueError: not a safetensors file, or one without a student's shape.
    """
    metadata = read_student_note(path)
    if "student_shape" not in metadata:
        raise ValueError(f"student weights {path} must hold `student_shape` in the metadata, got {sorted(metadata)}")
    return StudentShape(**json.loads(metadata["student_shape"]))


def load_student(path: Path, *, dtype: torch.dtype = torch.float32) -> CausalStudent:
    """A student with the weights and the shape of a file written by `save_student`.

    Raises:
        ValueError: the file is not a student's, or its tensors do not fit its shape.
    """
    student = CausalStudent(read_student_shape(path)).to(dtype)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    check_names_and_shapes(student.state_dict(), tensors, source=f"student weights {path}")
    student.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    return student
