"""A student from a weight file of any format; one tensor at a time, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights.accounting import check_names_and_shapes
from afd.models.weights.adapters import merge_adapters
from afd.models.weights.shapes import resolve_shape
from afd.models.weights.sources import WeightSource, open_source


@dataclass(frozen=True)
class StudentFile:
    """An opened weight file that fits a student: nothing but headers has been read.

    Attributes:
        source: its tensors by the student's names, adapters merged.
        shape: the student's dimensions.
    """

    source: WeightSource
    shape: StudentShape

    @property
    def num_parameters(self) -> int:
        """Parameters of the student."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.source.tensors.values())


def open_student(
    path: Path | str, config: Mapping[str, Any] | None = None, *, merge_dtype: torch.dtype | None = None
) -> StudentFile:
    """Open weights of any format and check every name and shape against the student they describe.

    Args:
        path: see `open_source`.
        config: fields of the configuration's student section: dimensions that the file cannot tell, and `init_base`,
            `init_weights`, `init_lora_alpha`.
        merge_dtype: of the layers whose adapters are merged; None keeps the base's.
    Raises:
        ValueError: no weights, not a Wan transformer's, or they do not fit.
    """
    given = dict(config or {})
    which = given.get("init_weights") or "average"
    base = given.get("init_base")
    source = merge_adapters(
        open_source(Path(path), which=which),
        None if base is None else open_source(Path(base), which=which),
        alpha=given.get("init_lora_alpha"),
        dtype=merge_dtype,
    )
    shape = resolve_shape(source, given)
    with torch.device("meta"):
        expected = CausalStudent(shape).state_dict()
    check_names_and_shapes(expected, source.tensors, source=source.label)
    return StudentFile(source, shape)


def load_student(
    path: Path | str, *, config: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> CausalStudent:
    """A student with the weights of a file or folder of any format (see `open_source`), on the CPU.

    Dimensions come from the file: config.json, the header, or the tensors' shapes. What those cannot tell comes from
    `config`. Text shorter than `text_len` is zero-padded by the student.

    Args:
        path: a diffusers model or pipeline folder, a Self-Forcing or Causal-Forcing .pt, one of our commits, a
            student.safetensors, or any safetensors file with a Wan transformer's tensors.
        config: fields of the configuration's student section, such as `num_heads`, `chunk_frames`, `text_len`.
        dtype: of the loaded parameters.
    Raises:
        ValueError: not student weights, or they do not fit; the first mismatches and the likely cause are named.
    """
    file = open_student(path, config)
    with torch.device("meta"):
        student = CausalStudent(file.shape)
    student.gradient_checkpointing = bool((config or {}).get("gradient_checkpointing", False))

    def own(parameter: nn.Parameter, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(dtype, copy=True).contiguous(), requires_grad=parameter.requires_grad)

    fill_student(student, file.source, own)
    return student


def fill_student(
    student: CausalStudent, source: WeightSource, place: Callable[[nn.Parameter, Tensor], nn.Parameter | None]
) -> None:
    """Read one tensor after the other and put it where it belongs; no more than one is alive at a time.

    Args:
        student: with parameters of any kind: on the meta device, or ZeRO-3 shards.
        source: tensors by the student's names.
        place: given a parameter and its tensor (CPU, maybe a view of a mapped file), writes it into the parameter and
            returns None, or returns the parameter to put in its place.
    """
    for name, parameter in list(student.named_parameters()):
        replacement = place(parameter, source.tensors[name].read())
        if replacement is not None:
            module, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(module), leaf, replacement)


def read_student_shape(path: Path | str, config: Mapping[str, Any] | None = None) -> StudentShape:
    """The dimensions of student weights of any format; reads headers only.

    Raises:
        ValueError: see `load_student`.
    """
    return open_student(path, config).shape
