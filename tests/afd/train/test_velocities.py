"""v, v_old and v_ref with one gather and with three passes, on real ZeRO-3 engines of two ranks, gathers counted."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("velocities_worker.py")
FORWARD, BACKWARD, MICRO_BATCHES, ROLES = 1, 1, 2, 3


@pytest.fixture(scope="module")
def result(launch: Any, tiny_inputs: Path) -> dict[str, Any]:
    return launch(WORKER, str(tiny_inputs / "other.safetensors"), ranks=2)


@pytest.fixture(scope="module")
def measured(result: dict[str, Any]) -> dict[str, Any]:
    return result["cases"]


@pytest.mark.parametrize("case", ["full", "LoRA", "LoRA, bf16"])
def test_one_gather_and_three_passes_train_the_same(measured: dict[str, Any], case: str) -> None:
    one, three = (measured[f"{case}, {mode}"] for mode in ("one_gather", "three_passes"))
    tolerance = 1e-3 if "bf16" in case else 1e-6  # the head sees the roles in one product or in three
    for mine, other in zip(one["rows"], three["rows"], strict=True):
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert one["rows"][-1]["student/old_deviation"] > 1e-5, "the old policy must lag for this to mean anything"
    assert one["rows"][-1]["student/prior"] > one["rows"][-1]["student/old_deviation"]
    for kept in ("weights", "old"):
        for name, values in one[kept].items():
            assert values == pytest.approx(three[kept][name], abs=tolerance), name


def test_with_adapters_each_block_is_gathered_once_for_all_three_velocities(measured: dict[str, Any]) -> None:
    one, three = (measured[f"LoRA, {mode}"]["students"]["update"] for mode in ("one_gather", "three_passes"))
    # DeepSpeed keeps a block between the end of a backward and the next forward: at most, not exactly.
    assert one <= MICRO_BATCHES * (FORWARD + BACKWARD)
    assert three - one > 0.95 * MICRO_BATCHES * (ROLES - 1)


def test_full_fine_tuning_gathers_each_role_once_for_all_micro_batches(measured: dict[str, Any]) -> None:
    one, three = (measured[f"full, {mode}"]["students"]["update"] for mode in ("one_gather", "three_passes"))
    assert one <= (ROLES - 1) + MICRO_BATCHES * (FORWARD + BACKWARD) + 0.01
    assert three - one > 0.95 * (ROLES - 1) * (MICRO_BATCHES - 1)


def test_a_rollout_phase_gathers_the_student_exactly_once(measured: dict[str, Any]) -> None:
    """However many chunks, steps and micro batches: two of each here."""
    assert {case: each["students"]["rollout"] for case, each in measured.items()} == dict.fromkeys(measured, 1.0)


@pytest.mark.parametrize("case", ["full, bf16", "LoRA, bf16, one_gather"])
def test_bf16_weights_train_through_float32_masters(measured: dict[str, Any], case: str) -> None:
    result = measured[case]
    assert (result["dtype"], result["masters"]) == ("torch.bfloat16", "torch.float32")
    assert all(row["student/skipped_steps"] == 0 for row in result["rows"])
    exact = measured["LoRA, one_gather" if "LoRA" in case else "full, one_gather"]["rows"]
    for row, other in zip(result["rows"], exact, strict=True):
        assert row["student/loss"] == pytest.approx(other["student/loss"], rel=0.05)
        assert row["student/flow_error"] == pytest.approx(other["student/flow_error"], rel=0.05)


def test_offload_to_the_host_changes_rounding_only(measured: dict[str, Any]) -> None:
    """The gradient's norm is summed in another order there, and clipping scales by it."""
    offloaded, held = measured["LoRA, offloaded"], measured["LoRA, one_gather"]
    for mine, other in zip(offloaded["rows"], held["rows"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    for name, values in held["weights"].items():
        assert offloaded["weights"][name] == pytest.approx(values, abs=1e-6), name


def test_a_compiled_rollout_of_another_batch_size_trains_the_same(measured: dict[str, Any]) -> None:
    rows = measured["LoRA, compiled and batched"]["rows"]
    for mine, other in zip(rows, measured["LoRA, one_gather"]["rows"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)  # float32, other batches in the matrix products


def test_either_mode_resumes_the_others_commits(result: dict[str, Any]) -> None:
    for resume in result["resumes"]:
        went_on, again = resume["rows"]
        assert again == pytest.approx(went_on, rel=1e-6, abs=1e-6)
        assert went_on["student/old_deviation"] > 1e-6
        assert any(".lora_A.default." in name for name in resume["names"])
        assert not any(".lora_A.old." in name or ".lora_B.old." in name for name in resume["names"])
