"""Whole AFD steps on real engines: any number of ranks, every objective knob, and the gradient written out by hand."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afd.config import RunConfig
from afd.distributed import World
from afd.rollout import sampler_times
from afd.train import objectives
from afd.types import VideoBatch

WORKER = Path(__file__).with_name("objectives_worker.py")
CASES = (
    "ema", "current", "plain", "stage 3 + stage 3", "two updates", "watched D", "terminal", "coupled", "LoRA", "vlm",
)  # fmt: skip
BASELINES = ("sft", "gan", "gan, non-saturating", "dmd")
BACKBONES = ("backbone, stage 3", "backbone, gan")


@pytest.fixture(scope="module")
def one(launch: Any, tiny_inputs: Path, vlm_folder: Path) -> dict[str, Any]:
    return launch(WORKER, str(tiny_inputs / "student.safetensors"), str(vlm_folder), launcher="plain")


@pytest.fixture(scope="module")
def two(launch: Any, tiny_inputs: Path, vlm_folder: Path) -> dict[str, Any]:
    return launch(WORKER, str(tiny_inputs / "student.safetensors"), str(vlm_folder), ranks=2)


def relative_difference(a: float, b: float) -> float:
    return abs(a - b) / max(1.0, abs(a))


@pytest.mark.parametrize("case", [*CASES, *BASELINES, *BACKBONES])
def test_two_ranks_train_like_one_process(one: dict[str, Any], two: dict[str, Any], case: str) -> None:
    for step, (alone, shared) in enumerate(zip(one[case]["rows"], two[case]["rows"], strict=True)):
        assert alone.keys() == shared.keys()
        for name, value in alone.items():
            tolerance = 1e-5 if name == "student/grad_norm" else 1e-6  # float32; the norm sums in another order
            assert relative_difference(value, shared[name]) < tolerance, f"{name} of step {step}"


def test_two_ranks_reach_the_weights_of_one_process(one: dict[str, Any], two: dict[str, Any]) -> None:
    for case in (*CASES, *BASELINES, *BACKBONES):
        for name, values in one[case]["weights"].items():
            assert values == pytest.approx(two[case]["weights"][name], abs=1e-6), f"{case}: {name}, float32"


def test_engine_moves_along_the_gradient_written_by_hand(one: dict[str, Any]) -> None:
    assert one["hand"]["gradient_norm"] > 0.1
    assert one["hand"]["old_distance"] > 1e-4, "the old policy must differ from the student for this to mean anything"
    # float32 engine against float64; the gradient is the difference of two branches about 30 times its size
    assert one["hand"]["relative_error"] < 1e-4


def test_optimality_weight_signs_the_gradient_at_the_old_policy(one: dict[str, Any]) -> None:
    assert one["signs"]["neutral"] == 0.0, "w = 1/2 without a prior must not move the student"
    assert one["signs"]["good"] > 1e-5
    assert one["signs"]["sum"] < 1e-5 * one["signs"]["good"], "w = 0 pushes exactly the other way"


def test_warm_up_leaves_the_student_alone(one: dict[str, Any]) -> None:
    rows = one["ema"]["rows"]
    assert not any(name.startswith("student/") for name in rows[0])
    assert {"student/loss", "student/old_deviation", "rollout/score_mean", "weight/std"} <= rows[1].keys()
    assert rows[1]["student/prior"] == rows[1]["student/old_deviation"] == 0.0, "nothing has moved yet"
    assert rows[2]["student/prior"] > 0
    assert one["ema"]["student_steps"] == 3


def test_weights_are_centred_and_in_range(one: dict[str, Any]) -> None:
    for case in CASES:
        for row in one[case]["rows"][1:]:
            assert row["weight/mean"] == pytest.approx(0.5, abs=1e-6)
            assert 0.0 <= row["weight/min"] < 0.5 < row["weight/max"] <= 1.0


def test_current_policy_has_no_lag(one: dict[str, Any]) -> None:
    assert all(row["student/old_deviation"] == 0.0 for row in one["current"]["rows"][1:])
    assert one["ema"]["rows"][3]["student/old_deviation"] > 0.0


def test_two_updates_per_rollout_are_two_optimizer_steps(one: dict[str, Any]) -> None:
    assert one["two updates"]["student_steps"] == 6


def test_warm_up_updates_the_discriminator_as_often_as_asked(one: dict[str, Any]) -> None:
    assert one["ema"]["discriminator_steps"] == 1 + 3
    assert one["two updates"]["discriminator_steps"] == 3 + 3 * 2


def test_lora_trains_adapters_and_leaves_the_base_bitwise(one: dict[str, Any]) -> None:
    assert any("lora_B" in name for name in one["LoRA"]["changed"])
    assert all("lora_" in name for name in one["LoRA"]["changed"])
    assert any(name.endswith("to_q.base_layer.weight") for name in one["LoRA"]["kept"])


def test_rollouts_with_merged_adapters_train_the_same_and_leave_the_base_bitwise(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    """Alone a rank's gathered weights are its shards themselves; with another they are copies of them."""
    for ranks in (one, two):
        merged, separate = ranks["LoRA, merged"], ranks["LoRA"]
        for mine, other in zip(merged["rows"], separate["rows"], strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-5), "float32"
        assert merged["kept"] == separate["kept"]
        for name in merged["kept"]:
            assert merged["weights"][name] == separate["weights"][name], name


def test_full_fine_tuning_moves_every_block(one: dict[str, Any]) -> None:
    assert {"patch_embedding.weight", "proj_out.weight"} <= set(one["ema"]["changed"])


def test_gan_moves_along_the_gradient_through_student_and_discriminator(one: dict[str, Any]) -> None:
    assert one["gan hand"]["gradient_norm"] > 1e-4
    assert one["gan hand"]["relative_error"] < 1e-4, "float32 engine against float64"


def test_dmd_rests_where_the_scores_agree(one: dict[str, Any]) -> None:
    assert one["dmd at agreement"]["gradient"] < 1e-5
    assert one["dmd at agreement"]["moved"] < 1e-2, "one AdamW step of lr 1e-2 on rounding noise at most"


def test_dmd_moves_the_student_every_few_critic_steps(one: dict[str, Any]) -> None:
    rows = one["dmd"]["rows"][1:]
    assert all("critic/loss" in row for row in rows)
    assert ["student/dmd_gradient" in row for row in rows] == [True, False, True]
    assert one["dmd"]["student_steps"] == 2


@pytest.mark.parametrize("case", BACKBONES)
def test_backbone_discriminator_learns_and_leads_the_student(one: dict[str, Any], case: str) -> None:
    rows = one[case]["rows"]
    assert rows[0]["discriminator/margin"] == 0.0, "its heads start at zero"
    assert rows[-1]["discriminator/margin"] > 1e-3
    assert one[case]["student_steps"] == 3
    assert all(row["student/grad_norm"] > 0 for row in rows[2:])


def test_objectives_that_ask_no_discriminator_build_none(one: dict[str, Any], two: dict[str, Any]) -> None:
    for case in ("sft", "sft, vlm", "dmd"):
        assert not any(name.startswith("discriminator/") for row in one[case]["rows"] for name in row)
        for ranks in (one, two):
            assert not ranks[case]["has_discriminator"]
            assert ranks[case]["is_view_of_latents"]
    assert one["ema"]["has_discriminator"]
    assert not one["vlm"]["is_view_of_latents"]
    assert one["sft"]["student_steps"] == 3
    assert one["sft, vlm"]["rows"] == one["sft"]["rows"], "whatever its section says"


def test_supervised_fine_tuning_moves_along_the_velocity_errors_gradient(one: dict[str, Any]) -> None:
    assert one["sft hand"]["gradient_norm"] > 0.1
    assert one["sft hand"]["relative_error"] < 1e-4, "float32 engine against float64"


def test_off_policy_rollouts_and_a_frozen_discriminator_stay_where_they_were(one: dict[str, Any]) -> None:
    assert one["stale"]["student"] > 1e-3
    assert one["stale"]["rollout"] == 0.0
    assert one["stale"]["discriminator"] == 0.0


def test_a_prompt_twice_in_a_step_is_two_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "gathered", nullcontext)
    monkeypatch.setattr(objectives, "rollout", lambda student, embeds, noise, times: noise[:, 0])
    roles: Any = SimpleNamespace(student=SimpleNamespace(train_micro_batch_size_per_gpu=lambda: 4))
    world, config = World(rank=0, local_rank=0, size=1, device=torch.device("cpu")), RunConfig()
    ids, embeds = torch.tensor([5, 7, 5]), torch.zeros(3, 16, 32)
    once = VideoBatch(ids, ("",) * 3, torch.zeros(3, 12, 3, 4, 4), embeds)

    def made(batch: VideoBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x_s, _ = objectives.roll_out(
            roles, batch, config, 0, world=world, times=sampler_times(config.rollout), policy="current"
        )
        draws = [torch.randn(8, generator=each) for each in objectives.sample_generators(batch, 4, 0, 1)]
        return list(zip(x_s.latents, draws, strict=True))

    before, rows = made(once), made(replace(once, repeats=(0, 0, 1)))
    for row in range(12):
        assert all(a.equal(b) for a, b in zip(before[row], rows[row], strict=True)) == (row < 8)
        assert not any(a.equal(b) for other in range(row) for a, b in zip(rows[other], rows[row], strict=True))


def test_share_of_groups_without_spread_needs_groups() -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    scores = torch.tensor([1.0, 1.0, 2.0, 3.0])
    for group_size, baseline, expected in ((2, "group", 0.5), (1, "batch", None)):
        config = RunConfig.model_validate({"rollout": {"group_size": group_size}, "nft": {"baseline": baseline}})
        metrics = objectives.weigh(scores, config, world=world)[1]
        assert metrics.get("rollout/zero_std_share") == expected, "one rollout alone never has a spread"
