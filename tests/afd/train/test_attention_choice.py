"""The configuration's choice of an attention implementation reaches every block."""

from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import StudentShape
from afd.config_file import ConfigError, load_config
from afd.models import attention
from afd.models.student import CausalStudent
from afd.train.builders import prepare_student
from afd.train.pretrain import make_base_student


@pytest.mark.parametrize(("text", "expected"), [("student: {attention_impl: reference}", "reference"), ("", None)])
def test_the_yaml_key_reaches_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str | None
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\n")
    shape = StudentShape(num_layers=2, num_heads=2, head_dim=12, ffn_dim=16, freq_dim=8, chunk_frames=2)
    student = prepare_student(CausalStudent(shape), load_config(path, []))
    seen: list[str | None] = []
    original = attention.block_causal_attention

    def spy(*tensors: Any, impl: str | None, **options: Any) -> torch.Tensor:
        seen.append(impl)
        return original(*tensors, impl=impl, **options)

    monkeypatch.setattr(attention, "block_causal_attention", spy)
    patch, width = shape.patch_size, shape.in_channels
    video = torch.zeros(1, width, 4, 2 * patch[1], 2 * patch[2])
    with torch.no_grad():
        student(video, torch.full((1, 4), 0.5), torch.zeros(1, shape.text_len, shape.text_dim), clean=video)
    assert seen == [expected] * 2


def test_pretraining_refuses_what_does_not_train_here_before_it_writes(tmp_path: Path) -> None:
    config = load_config(None, ["student.attention_impl=chunks:flash3"])
    with pytest.raises(ConfigError, match=r"^student\.attention_impl: attention backend 'flash3' is not installed"):
        make_base_student(config, tmp_path / "base")
    assert not (tmp_path / "base").exists()
