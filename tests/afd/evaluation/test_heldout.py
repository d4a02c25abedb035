"""How many held-out clips are generated together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from afd.config import RunConfig, StudentShape
from afd.distributed import World
from afd.evaluation import heldout
from afd.evaluation.heldout import HeldoutEvaluator
from afd.models.dct_codec import DCTCodec
from afd.models.student import CausalStudent
from afd.types import VideoBatch

SMALL = StudentShape(num_layers=4, num_heads=2, head_dim=32, ffn_dim=64, freq_dim=16)
LARGE = SMALL.model_copy(update={"num_layers": 30, "num_heads": 12, "head_dim": 128})  # 2.3 GiB of cache for 32 clips


@pytest.mark.parametrize(
    ("shape", "overrides", "rollout_batch", "expected"),
    [
        (SMALL, {}, 1, [32, 8]),
        (SMALL, {"batch_size": 2}, None, [32, 8]),
        (LARGE, {}, 16, [16, 16, 8]),
        (LARGE, {}, 64, [32, 8]),
        (LARGE, {"batch_size": 20}, None, [20, 20]),
        (LARGE, {}, None, [1] * 40),
    ],
)
def test_no_more_clips_of_a_large_student_together_than_in_a_training_rollout(
    monkeypatch: pytest.MonkeyPatch,
    shape: StudentShape,
    overrides: dict[str, Any],
    rollout_batch: int | None,
    expected: list[int],
) -> None:
    sizes: list[int] = []

    def fake_rollout(student: CausalStudent, embeds: Tensor, noise: Tensor, times: Any) -> Tensor:
        sizes.append(len(embeds))
        return noise[:, 0]

    monkeypatch.setattr(heldout, "rollout", fake_rollout)
    with torch.device("meta"):
        student = CausalStudent(shape)
    config = RunConfig()
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=overrides)})
    batch = VideoBatch(torch.arange(20), ("",) * 20, torch.zeros(20, 12, 12, 4, 4), torch.zeros(20, 16, 32))
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    evaluator = HeldoutEvaluator(batch, DCTCodec(), config, world, rollout_batch=rollout_batch)
    rows = [(row, seed) for row in range(20) for seed in range(2)]
    assert evaluator.sample(student, rows).shape == (40, 12, 12, 4, 4)
    assert sizes == expected
