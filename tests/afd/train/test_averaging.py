"""Parameter averages: the formula, the schedules, and swaps that really change and really restore."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from afd.train.averaging import ParameterAverage, decay_after_75, decay_none, decay_ramp_to_half

WORKER = Path(__file__).with_name("averaging_worker.py")


@pytest.fixture(scope="module", params=[("plain", 1), ("torchrun", 2)], ids=["1 rank", "2 ranks"])
def measured(request: pytest.FixtureRequest, launch: Any) -> dict[str, Any]:
    launcher, ranks = request.param
    return launch(WORKER, ranks=ranks, launcher=launcher)


@pytest.fixture(params=["0", "2", "3"])
def stage(request: pytest.FixtureRequest, measured: dict[str, Any]) -> dict[str, Any]:
    return measured["stages"][request.param]


def test_average_follows_the_formula(stage: dict[str, Any]) -> None:
    assert stage["formula"] < 3e-7  # float32


def test_applied_changes_the_forward_with_and_without_hooks(stage: dict[str, Any]) -> None:
    assert stage["moved"] > 1e-3
    assert stage["applied"] < 1e-6  # float32
    assert stage["gathered"] < 1e-6


def test_applied_restores_the_originals_bit_for_bit(stage: dict[str, Any]) -> None:
    assert stage["restored"] == 0.0
    assert stage["bitwise"]


def test_decay_1_is_a_frozen_reference(stage: dict[str, Any]) -> None:
    assert stage["reference"] < 1e-6  # float32


def test_state_survives_a_round_trip(stage: dict[str, Any]) -> None:
    assert stage["reloaded"]


def test_misuse_is_an_error(stage: dict[str, Any], measured: dict[str, Any]) -> None:
    assert stage["nested"] == "average 'reference' cannot be applied inside average 'ema'"
    assert stage["update_inside"] == "average 'ema' cannot be updated while an average is applied"
    assert stage["unknown"].startswith("average 'copy' does not fit this model: missing [] of 0, unknown ['9.weight']")
    assert stage["shape"] == "average 'copy': 0.bias must be [7], got [9]"
    sharded = measured["stages"]["3"]
    assert sharded["outside"] == "the parameters are gathered: enter `applied()` first and `gathered(engine)` inside it"
    assert '"stage3_param_persistence_threshold": 0' in measured["persistent"]


def test_bf16_shards_are_averaged_in_float32(measured: dict[str, Any]) -> None:
    assert measured["bf16"] == {"restored": True, "changed": True, "dtype": ["torch.float32"]}


def test_schedules_are_diffusion_nfts() -> None:
    assert [decay_none(step) for step in (0, 10)] == [0.0, 0.0]
    assert [decay_ramp_to_half(step) for step in (0, 100, 500, 9000)] == [0.0, 0.1, 0.5, 0.5]
    assert [decay_after_75(step) for step in (0, 74, 75, 1000)] == [0.0, 0.0, 0.0, 0.999]
    assert decay_after_75(95) == pytest.approx(0.15)


def test_schedule_sees_the_step_on_a_plain_module() -> None:
    module = nn.Linear(2, 1)
    average = ParameterAverage(module, decay=lambda step: 0.0 if step < 2 else 1.0, name="old_policy")
    with torch.no_grad():
        module.weight.fill_(3.0)
    assert average.update(1) == 0.0
    with torch.no_grad():
        module.weight.fill_(5.0)
    assert average.update(2) == 1.0
    with average.applied():
        assert module.weight.tolist() == [[3.0, 3.0]]
    assert module.weight.tolist() == [[5.0, 5.0]]


def test_bad_decay_and_frozen_module_are_errors() -> None:
    with pytest.raises(ValueError, match=r"decay of average 'ema' must be in \[0, 1\], got 1.5"):
        ParameterAverage(nn.Linear(1, 1), decay=1.5, name="ema")
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got -1"):
        ParameterAverage(nn.Linear(1, 1), decay=lambda step: -1, name="ema").update(0)
    with pytest.raises(ValueError, match="needs at least one parameter that requires a gradient"):
        ParameterAverage(nn.Linear(1, 1).requires_grad_(False), decay=0.5, name="ema")
