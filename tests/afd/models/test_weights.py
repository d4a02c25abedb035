"""Names of the original Wan code, and student files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights import (
    check_names_and_shapes,
    diffusers_name,
    load_student,
    read_student_shape,
    save_student,
    stored_shape,
)

MakeStudent = Callable[..., CausalStudent]
REFERENCE = Path(__file__).parents[2] / "data" / "self_forcing_tiny.safetensors"


@pytest.mark.parametrize(
    ("original", "renamed"),
    [
        ("model.time_embedding.0.weight", "condition_embedder.time_embedder.linear_1.weight"),
        ("time_embedding.2.bias", "condition_embedder.time_embedder.linear_2.bias"),
        ("text_embedding.0.weight", "condition_embedder.text_embedder.linear_1.weight"),
        ("text_embedding.2.weight", "condition_embedder.text_embedder.linear_2.weight"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.bias", "proj_out.bias"),
        ("model._fsdp_wrapped_module.blocks.29.modulation", "blocks.29.scale_shift_table"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight"),
        ("blocks.0.ffn.2.bias", "blocks.0.ffn.net.2.bias"),
        ("blocks.7.norm3.weight", "blocks.7.norm2.weight"),
        ("blocks.7.self_attn.q.weight", "blocks.7.attn1.to_q.weight"),
        ("blocks.7.self_attn.o.bias", "blocks.7.attn1.to_out.0.bias"),
        ("blocks.7.self_attn.norm_k.weight", "blocks.7.attn1.norm_k.weight"),
        ("blocks.7.cross_attn.v.weight", "blocks.7.attn2.to_v.weight"),
        ("blocks.7.cross_attn.o.weight", "blocks.7.attn2.to_out.0.weight"),
        ("blocks.7.cross_attn.norm_q.weight", "blocks.7.attn2.norm_q.weight"),
        ("patch_embedding.weight", "patch_embedding.weight"),
    ],
)
def test_rename_table(original: str, renamed: str) -> None:
    assert diffusers_name(original) == renamed
    assert diffusers_name(renamed) == renamed


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_every_original_weight_finds_its_place(prefix: str) -> None:
    shape = StudentShape(
        in_channels=16,
        out_channels=16,
        patch_size=(1, 2, 2),
        num_layers=2,
        head_dim=32,
        ffn_dim=160,
        freq_dim=256,
        text_len=8,
        text_dim=24,
    )
    original = {name[len("weight.") :]: w for name, w in load_file(REFERENCE).items() if name.startswith("weight.")}
    weights = {diffusers_name(prefix + name): w for name, w in original.items()}
    assert len(weights) == len(original)
    check_names_and_shapes(CausalStudent(shape).state_dict(), weights, source="reference")


def test_float32_round_trip_is_exact(make_student: MakeStudent, tmp_path: Path) -> None:
    student = make_student(chunk_frames=2, window_frames=4, sink_frames=1, patch_size=(1, 2, 1))
    path = tmp_path / "deep" / "student.safetensors"
    save_student(student, path, dtype=torch.float32, note={"made_by": "a test"})
    loaded = load_student(path)
    assert loaded.shape == student.shape == read_student_shape(path)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_float16_files_load_as_the_rounded_weights(make_student: MakeStudent, tmp_path: Path) -> None:
    student, path = make_student(), tmp_path / "student.safetensors"
    save_student(student, path, dtype=torch.float16, note={})
    assert all(tensor.dtype == torch.float16 for tensor in load_file(path).values())
    for dtype in (torch.float32, torch.float64):
        loaded = load_student(path, dtype=dtype)
        for name, tensor in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.half().to(dtype)), name


def test_mismatches_are_named_and_counted() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1), "d": torch.zeros(1)}
    got = {"b": torch.zeros(4), "e": torch.zeros(1)}
    message = "file does not fit the model: a is missing; c is missing; d is missing (and 2 more)"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_names_and_shapes(expected, got, source="file")
    with pytest.raises(ValueError, match=re.escape("e is not a parameter of the model; b must be [3], got [4]")):
        check_names_and_shapes({"b": torch.zeros(3)}, got, source="file")


def test_a_file_that_does_not_fit_its_shape_is_refused(make_student: MakeStudent, tmp_path: Path) -> None:
    student, path = make_student(), tmp_path / "student.safetensors"
    weights = {name: tensor for name, tensor in student.state_dict().items() if name != "proj_out.bias"}
    save_file(weights, path, metadata={"student_shape": student.shape.model_dump_json()})
    with pytest.raises(ValueError, match=r"student\.safetensors does not fit the model: proj_out\.bias is missing"):
        load_student(path)


def test_files_that_are_no_students_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    with pytest.raises(ValueError, match="do not exist"):
        read_student_shape(path)
    path.write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        read_student_shape(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not hold a Wan transformer"):
        read_student_shape(path)
    with pytest.raises(ValueError, match=re.escape("must hold `student_shape` in the metadata, got ['format']")):
        stored_shape(path)
