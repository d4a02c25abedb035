"""`afd plan`: what it says, what it refuses in the trainer's words, and what it proposes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from afd.cli import main
from afd.config_file import ConfigError, load_config
from afd.planning import tables
from afd.planning.hardware import GPUS, INTERCONNECTS
from afd.planning.memory import Memory
from afd.planning.plan import Machine, make_plan, planned_shape, remedies
from afd.train.ds_config import load_ds_config

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
WAN, WAN_14B = CONFIGS / "wan_1_3b_self_forcing.yaml", CONFIGS / "wan_14b.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(
    config: Path, *overrides: str, ds: str = "zero3_h100.json", gpus: int = 8, changes: dict[str, Any] | None = None
) -> Any:
    run = load_config(config, overrides)
    student = load_ds_config(CONFIGS / ds) | (changes or {})
    pair = (student, load_ds_config(CONFIGS / "zero2_discriminator_h100.json"), load_ds_config(CONFIGS / ds))
    machine = Machine(GPUS["h100-80g"], INTERCONNECTS["ib-400"], gpus)
    shape = planned_shape(run)
    return make_plan(run, shape, pair, machine), lambda: remedies(run, shape, pair, machine)


VLM = CONFIGS / "wan_1_3b_self_forcing_vlm.yaml"


def test_a_vlm_is_not_planned_without_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(VLM)]) == 2
    assert "models/Qwen2-VL-2B-Instruct" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("wan_*.yaml")} - {VLM}), ids=lambda path: path.stem)
def test_every_wan_configuration_is_planned_without_its_files(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(path)]) == 0
    text = capsys.readouterr().out
    assert "every number is a prediction" in text
    assert "| KV cache |" in text
    assert re.search(r"s a step; MFU \d+%; [\d,]+ tokens/s; [\d,]+ videos/day; \$ [\d,]+ per 1000 steps", text)


def test_14b_fits_eight_gpus_with_lora_and_full_with_offload_only() -> None:
    assert plan_of(WAN_14B)[0].fits
    assert plan_of(WAN_14B, "student.lora.rank=0", ds="zero3_offload.json")[0].fits
    full, changes = plan_of(WAN_14B, "student.lora.rank=0")
    assert not full.fits
    proposed = [each.change for each in changes()]
    assert any("student.lora.rank" in change for change in proposed)
    assert any("offload_optimizer" in change for change in proposed)
    seconds = [each.plan.step.seconds for each in changes()]
    assert seconds == sorted(seconds), "cheapest first: the batch is the same in all of these"


def test_a_full_fine_tune_of_1_3b_fits_one_gpu() -> None:
    plan, _ = plan_of(WAN, "student.lora.rank=0", gpus=1)
    assert plan.fits
    assert plan.step.phases["update"].sent_bytes == 0


def test_merged_adapters_save_rollout_products_and_take_memory_only_where_nothing_is_gathered() -> None:
    merge, three = "rollout.merge_adapters=true", "nft.velocities=three_passes"
    for gpus, extra in ((1, True), (8, False)):
        apart, merged = (plan_of(WAN, three, *given, gpus=gpus)[0] for given in ((), (merge,)))
        full = plan_of(WAN, "student.lora.rank=0", gpus=gpus)[0]
        assert merged.step.phases["rollout"].flops == full.step.phases["rollout"].flops
        assert merged.step.phases["rollout"].flops < apart.step.phases["rollout"].flops
        assert merged.step.phases["update"].flops == apart.step.phases["update"].flops
        assert bool(merged.memory.phases["rollout"]["merged weights"]) == extra


def test_without_recomputation_wan_does_not_fit_and_the_first_proposal_is_recomputation() -> None:
    plan, changes = plan_of(WAN, "student.gradient_checkpointing=false")
    assert not plan.fits
    assert {each.change for each in changes()} == {"student.gradient_checkpointing=true"}


def test_hpz_keeps_gathers_inside_a_node_and_pays_on_a_slow_network() -> None:
    run = load_config(WAN_14B)
    shape = planned_shape(run)
    discriminator = load_ds_config(CONFIGS / "zero2_discriminator_h100_64.json")
    student = load_ds_config(CONFIGS / "zero3_h100_64.json")
    zero = {key: value for key, value in student["zero_optimization"].items() if key != "zero_hpz_partition_size"}
    machine = Machine(GPUS["h100-80g"], INTERCONNECTS["ethernet-100"], 64)
    with_hpz = make_plan(run, shape, (student, discriminator), machine)
    without = make_plan(run, shape, (student | {"zero_optimization": zero}, discriminator), machine)
    assert with_hpz.step.phases["update"].network_s < 0.5 * without.step.phases["update"].network_s
    assert with_hpz.memory.held["second copy of the weights (hpZ)"] > 3 * 2**30


PHASES = {
    "afd": ["rollout", "discriminator", "update"],
    "sft": ["update"],
    "gan": ["rollout", "discriminator", "update"],
    "dmd": ["rollout", "critic", "update"],
}
DMD = "dmd.ds_config=configs/zero3_h100.json"


@pytest.mark.parametrize("objective", PHASES)
def test_every_objective_is_planned_by_its_own_phases(objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", str(WAN), f"objective={objective}", DMD, "video.num_frames=9"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["objective"] == objective
    assert list(data["phases"]) == list(data["collectives"]) == PHASES[objective]
    held, parameters = data["memory"]["held"], data["parameters"]
    assert bool(held["discriminator (weights, optimizer)"]) == bool(parameters["discriminator"])
    assert ("discriminator" in PHASES[objective]) == bool(parameters["discriminator"])
    assert held.get("real score (float32)", 0) == 4 * parameters.get("real_score", 0) // 8
    assert main(command) == 0
    text = capsys.readouterr().out
    assert [name for name in ("rollout", "discriminator", "critic", "update") if f"\n| {name} | " in text] == (
        PHASES[objective]
    )
    assert f"objective {objective}" in text
    assert ("noised teacher clips a step" in text) == (objective == "sft")
    assert ("each as likely" in text) == (objective in ("gan", "dmd"))


def test_a_mean_step_of_dmd_holds_its_share_of_an_update_and_the_peak_all_of_it() -> None:
    every, fifth = (plan_of(WAN, "objective=dmd", f"dmd.critic_steps={steps}")[0] for steps in (1, 5))
    assert fifth.step.phases["update"].seconds == pytest.approx(every.step.phases["update"].seconds / 5, rel=1e-6)
    assert fifth.step.phases["update"].flops == pytest.approx(every.step.phases["update"].flops / 5)
    assert fifth.step.phases["critic"] == every.step.phases["critic"]
    assert fifth.memory == every.memory
    assert fifth.memory.phases["slope"]["gathered critic or real score"] == 2 * fifth.workload.critic.parameters.total
    kept, recomputed = (
        plan_of(WAN, "objective=dmd", f"student.gradient_checkpointing={each}")[0] for each in ("false", "true")
    )
    activations = [each.memory.phases["critic"]["activations"] for each in (kept, recomputed)]
    assert activations[0] > 5 * activations[1], "the critic recomputes its blocks where the student does"


def test_a_mean_rollout_takes_the_mean_of_the_truncated_ones() -> None:
    steps = ["[1000]", "[1000, 500]", "[1000, 750, 500]"]
    mean = plan_of(WAN, "objective=gan", f"rollout.steps={steps[-1]}")[0]
    whole = [plan_of(WAN, f"rollout.steps={each}")[0].step.phases["rollout"].flops for each in steps]
    assert mean.step.phases["rollout"].flops == pytest.approx(sum(whole) / 3)
    one = plan_of(WAN, "objective=gan", "rollout.steps=[1000]")[0]
    assert mean.memory.phases["rollout"]["rollouts and noise"] > one.memory.phases["rollout"]["rollouts and noise"]
    # A forward without gradient more on average: two of three, one of two, none.
    passes = mean.step.phases["update"].model_flops - one.step.phases["update"].model_flops
    supervised = plan_of(WAN, "objective=sft")[0].step.phases["update"].model_flops
    assert passes == pytest.approx(supervised / 3, rel=0.12), "a forward is a third of a training pass"


def test_json_says_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(WAN), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["memory"]["fits"]
    assert data["memory"]["peak"] == sum(data["memory"]["held"].values()) + sum(
        data["memory"]["phases"][data["memory"]["peak_phase"]].values()
    )
    assert data["remedies"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "6"], "train_batch_size 64 must be a multiple of train_micro_batch_size_per_gpu 1 * ranks 6 = 6"),
        (["rollout.group_size=16"], "train_batch_size 64 must be a multiple of rollout.group_size 16 x 8 ranks"),
        (["video.num_frames=20"], "video.num_frames must be 3 + a multiple of the student's chunk 3, got 20"),
        (["--gpus", "16", "--gpus_per_node", "12", "rollout.group_size=4"], "16 ranks must fill whole nodes of 12"),
        (["student.gradient_checkpointing=false"], "the update phase needs"),
    ],
)
def test_what_does_not_divide_or_fit_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(WAN), *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sequence_parallel_size": 5}, "sequence_parallel_size must divide the student's 12 heads, got 5"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size must be 1"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "zero_hpz_partition_size must divide 8"),
    ],
)
def test_heads_and_hpz_that_do_not_divide_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_of(WAN, changes=changes)


def test_an_unknown_shape_is_named(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "chunk_wise.yaml", [f"student.init_from={tmp_path / 'none.pt'}"])
    with pytest.raises(ConfigError, match=r"student\.in_channels must be written in the YAML to plan without"):
        planned_shape(config)


@pytest.mark.parametrize("path", [ROOT / "docs" / "planning.md", ROOT / "README.md"], ids=lambda path: path.name)
def test_the_tables_in_the_documentation_are_up_to_date(path: Path) -> None:
    assert tables.rewritten(path) == path.read_text(), f"run: afd plan --write_docs {path.name}"


def test_the_peak_is_the_largest_phase() -> None:
    memory = Memory({"a": 1}, {"x": {"b": 2}, "y": {"c": 5, "d": 1}}, {})
    assert (memory.peak, memory.peak_phase, memory.at("x")) == (7, "y", 3)
