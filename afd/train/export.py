"""Exports of a commit or of any student weights: which tensors, the sampler's facts and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from afd.config import RunConfig, StudentShape
from afd.config_file import load_config
from afd.models.weights.adapters import merge_adapters, split_adapters
from afd.models.weights.exporting import check_empty, export_adapter, export_diffusers, export_original
from afd.models.weights.loading import StudentFile, open_student
from afd.models.weights.shapes import resolve_shape
from afd.models.weights.sources import CONFIG, STUDENT_WEIGHTS, LazyTensor, WeightSource, Which, open_source
from afd.models.weights.streaming import write_tensors
from afd.train.commit import file_sha256, read_manifest
from afd.train.model_card import write_card
from afd.train.restore import resolve_commit

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AVERAGE_FILE = "averages/ema.safetensors"


@dataclass(frozen=True)
class ExportChoice:
    """How a student leaves.

    Attributes:
        which: the averaged or the raw weights.
        lora: adapters merged into the weights, or beside them in peft's format.
        dtype: of the written weights; None keeps every bit.
        components: a diffusers pipeline folder whose VAE, text encoder and tokenizer go along.
    """

    which: Which = "average"
    lora: Literal["merged", "separate"] = "merged"
    dtype: torch.dtype | None = None
    components: Path | None = None


def convert_student(source: Path, out: Path, *, student: Mapping[str, Any], dtype: torch.dtype | None) -> StudentShape:
    """Write weights of any format as one student.safetensors, tensor by tensor; adapters are merged.

    Args:
        source: see `afd.models.weights.open_student`, or a run's folder.
        out: the file.
        student: fields of the student section that the file does not tell.
        dtype: of the written weights; None keeps every bit.
    Raises:
        ValueError: the weights do not fit, or `out` is no .safetensors file.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out.name}")
    file = open_student(_resolved(source), student, merge_dtype=dtype)
    note = {"student_shape": file.shape.model_dump_json(), "converted_from": source.name}
    write_tensors(file.source.tensors, out, dtype=dtype, metadata=note)
    return file.shape


def export_for_diffusers(
    source: Path, out: Path, *, choice: ExportChoice, student: Mapping[str, Any], config: RunConfig | None
) -> None:
    """Write a diffusers folder; see `afd.models.weights.exporting.export_diffusers`.

    Args:
        source: a commit, a run's folder, or any student weights.
        out: the folder.
        choice: how.
        student: fields of the student section that the file does not tell.
        config: the configuration whose sampler is written; a commit brings its own.
    Raises:
        ValueError: the weights do not fit or are damaged, the sampler is unknown, or `out` holds something.
    """
    check_empty(out)
    path = _resolved(source)
    commit = path if _is_commit(path) else None
    known = config or (load_config(path / CONFIG) if commit is not None else None)
    if known is None:
        raise ValueError(f"--config must name the configuration whose sampler {source} is for: it is not a commit")
    given = {"init_weights": choice.which, **student}
    if choice.lora == "separate":
        file, adapters, alpha = _separated(path, given)
    else:
        file, adapters, alpha = open_student(path, given, merge_dtype=choice.dtype), {}, 0
    lora = choice.lora if split_adapters(open_source(path, which=choice.which).tensors)[1] else None
    rollout = known.rollout
    export_diffusers(
        file.source.tensors,
        file.shape,
        out,
        sampling={
            "steps": list(rollout.steps),
            "first_chunk_steps": None if rollout.first_chunk_steps is None else list(rollout.first_chunk_steps),
            "shift": rollout.shift,
            "context_noise": rollout.context_noise,
        },
        card=write_card(source, file.shape, weights=choice.which, lora=lora, config=known, commit=commit),
        dtype=choice.dtype,
        components=choice.components,
    )
    if adapters:
        export_adapter(adapters, out / "lora", alpha=alpha, dtype=choice.dtype)


def export_for_peers(source: Path, out: Path, *, choice: ExportChoice, student: Mapping[str, Any]) -> None:
    """Write the original names; a commit's raw and averaged weights become `generator` and `generator_ema`.

    Weights that come in one kind are written once, under both keys.

    Raises:
        ValueError: the weights do not fit or are damaged, or adapters are to stay separate.
    """
    if choice.lora == "separate":
        raise ValueError("--lora separate is for --format diffusers: the peers' code reads whole weights")
    path = _resolved(source)

    def tensors(which: Which) -> Mapping[str, LazyTensor]:
        return open_student(path, {"init_weights": which, **student}, merge_dtype=choice.dtype).source.tensors

    averaged = tensors(choice.which)
    raw = tensors("raw") if _is_commit(path) else averaged
    if choice.which == "raw":
        averaged = raw
    export_original({"generator": raw, "generator_ema": averaged}, out, dtype=choice.dtype)


def _separated(path: Path, given: Mapping[str, Any]) -> tuple[StudentFile, dict[str, LazyTensor], float]:
    """The base, the adapters on it, and their alpha."""
    which: Which = given.get("init_weights", "average")
    source = open_source(path, which=which)
    own, adapters = split_adapters(source.tensors)
    if not adapters:
        raise ValueError(f"--lora separate needs adapters, {source.label} hold none")
    merge_adapters(source, None, alpha=given.get("init_lora_alpha"))  # refuses what does not fit
    alpha = source.lora_alpha if source.lora_alpha is not None else given.get("init_lora_alpha")
    if alpha is None:
        raise ValueError("--lora separate needs one alpha for all layers, which these adapters do not have: merge them")
    base = WeightSource(source.label, own, source.facts)
    return StudentFile(base, resolve_shape(base, given)), adapters, float(alpha)


def _resolved(source: Path) -> Path:
    """A run's or checkpoints folder becomes its newest commit; a commit's weights are checked against its manifest."""
    if not source.is_dir():
        return source
    has_commits = any((folder / "latest").exists() for folder in (source, source / "checkpoints"))
    path = resolve_commit(source) if has_commits else source
    if _is_commit(path):
        files = read_manifest(path)["files"]
        for name in (STUDENT_WEIGHTS, AVERAGE_FILE):
            if name in files and file_sha256(path / name) != files[name]["sha256"]:
                raise ValueError(f"{path / name} is damaged: it is not what its manifest says")
    return path


def _is_commit(path: Path) -> bool:
    return (path / STUDENT_WEIGHTS).is_file() and (path / CONFIG).is_file()
