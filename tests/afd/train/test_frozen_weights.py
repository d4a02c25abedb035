"""Digests of frozen weights: of the numbers and the names, not of what is trained or where it was read."""

from typing import Any

import torch
from torch import nn

from afd.models.lora import add_lora, add_old_adapter
from afd.train.averaging import ParameterAverage
from afd.train.frozen_weights import frozen_digests, frozen_problem


class Base(nn.Module):
    """A base with one linear layer inside a block, whose adapters are trained."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch_embedding, self.blocks = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4))


def adapted(*, seed: int = 0, has_old: bool = False) -> Any:
    student = Base(seed=seed)
    add_lora(student, rank=2, alpha=2, targets=["blocks.0"])
    if has_old:
        add_old_adapter(student, rank=2, alpha=2, targets=["blocks.0"])
    return student


def digest(module: Any) -> str:
    return frozen_digests({"student": module}, {})["student"]


def test_digest_is_of_the_base_alone() -> None:
    mine = digest(adapted())
    trained = adapted()
    trained.blocks[0].lora_B["default"].weight.data.fill_(3.0)
    assert digest(trained) == mine
    assert digest(adapted(has_old=True)) == mine, "the old policy's adapter follows the trained one"
    assert digest(adapted(seed=1)) != mine
    nudged = adapted()
    nudged.blocks[0].base_layer.bias.data[3] += 1e-6
    assert digest(nudged) != mine
    assert digest(adapted().to(torch.bfloat16)) != mine


def test_full_fine_tuning_has_no_digest_and_a_fixed_average_has() -> None:
    module: Any = Base()
    digests = frozen_digests(
        {"student": module}, {"real_score": ParameterAverage(module, decay=1.0, name="real score")}
    )
    assert digests.keys() == {"real_score"}
    module.blocks[0].bias.data += 1
    other = ParameterAverage(module, decay=1.0, name="real score")
    assert frozen_digests({}, {"real_score": other}) != digests


def test_commits_without_digests_stay_resumable() -> None:
    assert frozen_problem({}, {"student": "a"}) is None
    assert frozen_problem({"student": "a", "discriminator": "b"}, {"student": "a"}) is None
    assert "other frozen weights of student (SHA-256 b, this run's a)" in str(
        frozen_problem({"student": "b"}, {"student": "a"})
    )
