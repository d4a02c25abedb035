"""Weights straight into ZeRO-3 shards, on two real ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import StudentShape
from afd.models.student import CausalStudent
from afd.models.weights import load_student, original_name, save_student

WORKER = Path(__file__).with_name("sharded_load_worker.py")
CANNOT_TELL = {"num_heads": 2, "text_len": 7, "chunk_frames": 2}
LORA = ("student.lora.rank=2", "student.lora.alpha=4")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "overrides"), [("float32", ()), ("bfloat16", LORA)])
def test_no_rank_ever_holds_more_than_one_whole_tensor(
    launch: Callable[..., Any], tmp_path: Path, dtype: str, overrides: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    shape = StudentShape(num_layers=6, head_dim=48, ffn_dim=400, chunk_frames=2, text_len=7)
    student = CausalStudent(shape)
    if overrides:
        path = tmp_path / "self_forcing_dmd.pt"
        original = {f"model.{original_name(name)}": tensor for name, tensor in student.state_dict().items()}
        torch.save({"generator_ema": original}, path)
        overrides = (*overrides, *(f"student.{name}={value}" for name, value in CANNOT_TELL.items()))
    else:
        path = tmp_path / "student.safetensors"
        save_student(student, path, dtype=torch.float32, note={})
    facts = launch(WORKER, str(path), dtype, *overrides, ranks=2)
    width = 4 if dtype == "float32" else 2
    assert facts["dtypes"] == [f"torch.{dtype}"]
    assert facts["whole"] == []
    assert facts["alive_at_once"] == (0 if path.suffix == ".pt" else 1)
    assert facts["reads"] == len(CausalStudent(shape).state_dict())
    # Half the model, padded to an even number of elements per parameter.
    assert facts["total"] * width / 4 / 2 <= facts["shards"] <= facts["total"] * width / 4 / 2 * 1.01
    # Beside the shards never more than one tensor: as it is built, and with its slice as it is read.
    assert facts["peak_built"] <= facts["shards"] + facts["largest"]
    assert facts["peak_filled"] <= facts["shards"] + 2 * facts["largest"]
    assert facts["peak_any_rank"] < facts["total"] * width / 4 * 0.75
    plain = load_student(path, config=CANNOT_TELL if overrides else None, dtype=getattr(torch, dtype))
    for name, tensor in plain.state_dict().items():
        saved = [n for n in facts["weights"] if n.replace("base_layer.", "") == name]
        assert len(saved) == 1
        torch.testing.assert_close(facts["weights"][saved[0]], tensor.float().sum().item(), rtol=1e-5, atol=1e-4)
    generator = torch.Generator().manual_seed(5)
    noisy, prompt = torch.randn(1, 12, 2, 2, 2, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        expected = plain(noisy, torch.full((1, 2), 0.5), prompt)
    assert facts["same"]
    torch.testing.assert_close(torch.tensor(facts["velocity"]), expected, rtol=0, atol=1e-6 if width == 4 else 2e-2)
