"""What is refused before a process group exists, and what `--dry_run` says."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from afd.config import EncodersSection, RunConfig, StudentShape, VideoSection, VLMSection
from afd.config_file import ConfigError, load_config
from afd.models.student import CausalStudent
from afd.models.vlm_builder import plan_vlm
from afd.models.weights import save_student
from afd.planning.workload import build_workload, engine_settings
from afd.train import preflight
from afd.train.ds_config import DSConfig, load_ds_config
from afd.train.preflight import RunPlan, describe_plan, plan_run

DS_STUDENT: DSConfig = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
DS_DISCRIMINATOR: DSConfig = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}
Plan = Callable[..., RunPlan]


def write_student(folder: Path, **changes: Any) -> Path:
    """A tiny student file that fits the default video; `changes` to its shape."""
    shape = StudentShape(**{"num_layers": 1, "num_heads": 1, "head_dim": 6, "ffn_dim": 8, "freq_dim": 4, **changes})
    path = folder / "student.safetensors"
    save_student(CausalStudent(shape), path, dtype=torch.float16, note={})
    return path


def make_config(folder: Path, *overrides: str) -> RunConfig:
    """The defaults with a tiny student and everything written under `folder`."""
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder / 'out'}\nstudent:\n  init_from: {folder / 'student.safetensors'}\n")
    return load_config(path, overrides)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """`plan(*overrides, shape=, student=, discriminator=, world_size=)`: plan a run with these changes."""

    def make(
        *overrides: str,
        shape: dict[str, Any] | None = None,
        student: DSConfig | None = None,
        discriminator: DSConfig | None = None,
        world_size: int = 2,
    ) -> RunPlan:
        write_student(tmp_path, **(shape or {}))
        ds_student = copy.deepcopy(DS_STUDENT) | (student or {})
        ds_discriminator = copy.deepcopy(DS_DISCRIMINATOR) | (discriminator or {})
        return plan_run(make_config(tmp_path, *overrides), ds_student, ds_discriminator, world_size=world_size)

    return make


def test_a_good_run_is_resolved(plan: Plan, tmp_path: Path) -> None:
    resolved = plan()
    assert resolved.student_path == tmp_path / "student.safetensors"
    assert resolved.num_parameters == sum(p.numel() for p in CausalStudent(resolved.shape).parameters())
    assert resolved.latents == (12, 12, 4, 4)
    assert (resolved.rollouts, resolved.prompts_per_rank, resolved.world_size) == (16, 2, 2)
    assert resolved.student_batch == (16, 4, 2)
    assert resolved.discriminator_batch == (16, 8, 1)
    assert resolved.times.times == pytest.approx((1.0, 0.75))
    assert not (tmp_path / "out").exists(), "planning must write nothing"


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        ([], {"student": {"train_batch_size": 18}}, "train_batch_size 18 must be a multiple of"),
        ([], {"world_size": 3}, "train_batch_size 16 must be a multiple of"),
        (
            [],
            {"discriminator": {"train_batch_size": 32}},
            "train_batch_size must be the same in both DeepSpeed JSONs (rollouts per step), got 16 for the student "
            "and 32 for the discriminator",
        ),
        (
            ["rollout.group_size=16"],
            {},
            "train_batch_size 16 must be a multiple of rollout.group_size 16 x 2 ranks",
        ),
        (
            ["rollout.group_size=2", "teacher.num_prompts=7"],
            {},
            "teacher.num_prompts must be at least 8, one step's, got 7",
        ),
        (["teacher.num_prompts=9999"], {}, "teacher.num_prompts must be in [0, 1656], as many as there are, got 9999"),
        (["prepare.device=gpu"], {}, "prepare.device must be cpu, cuda or cuda:N, got 'gpu'"),
        (
            ["teacher.live.enabled=true", "teacher.live.device=gpu"],
            {},
            "teacher.live.device must be cpu, cuda or cuda:N, got 'gpu'",
        ),
        (["rollout.group_size=1"], {}, "rollout.group_size must be > 1 with nft.baseline = group"),
        (["rollout.steps=[500, 500]"], {}, "steps must be strictly decreasing integers"),
        (["rollout.first_chunk_steps=[500, 500]"], {}, "steps must be strictly decreasing integers"),
        (["nft.noise_coupling=0.5", "objective=sft"], {}, "nft.noise_coupling must be 0 with objective = sft"),
        (["student.num_layers=3"], {}, "student.num_layers must be "),
        (["video.num_frames=13"], {}, "video.num_frames must be 3 + a multiple of the student's chunk 3, got 13"),
        (["video.num_frames=2"], {}, "video.num_frames must be 3 + a multiple of the student's chunk 3, got 2"),
        (
            ["student.attention_impl=chunks:fast"],
            {},
            "student.attention_impl: the chunks backend must be one of flash3, flash2, sdpa, cudnn, hub3, hub2, "
            "got 'fast'",
        ),
        (
            ["student.attention_impl=chunks:flash3"],
            {},
            "student.attention_impl: attention backend 'flash3' is not installed; to install it: build ",
        ),
        (
            ["student.attention_impl=triton"],
            {"shape": {"head_dim": 16}},
            "student.attention_impl: impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1 on CPU), got cpu",
        ),
        (["video.height=18"], {}, "video.height and video.width must be divisible by 4 for codec dct, got 18 x 16"),
        (
            ["video.height=20"],
            {"shape": {"patch_size": (1, 2, 2)}},
            "video.height and video.width must give latents divisible by the student's patch [2, 2], got latents 5 x 4",
        ),
        (
            [],
            {"shape": {"in_channels": 16, "out_channels": 16}},
            "student must have in_channels = out_channels = 12, the channels of encoders.codec = dct, got 16 and 16",
        ),
        ([], {"shape": {"in_channels": 28}}, "student must be a text-to-video student to be trained (shards hold no"),
        ([], {"shape": {"image_dim": 8}}, "student must be a text-to-video student to be trained (shards hold no"),
        (["encoders.codec=wan_vae"], {}, "student must have in_channels = out_channels = 16"),
        (
            ["encoders.codec=wan_vae"],
            {"shape": {"in_channels": 16, "out_channels": 16}},
            "encoders.vae_path must name an AutoencoderKLWan folder for codec wan_vae, got none",
        ),
        (
            ["student.first_chunk_frames=1"],
            {},
            "video.num_frames must be 1 + a multiple of the student's chunk 3, got 12",
        ),
        (["discriminator.shape.in_channels=16"], {}, "discriminator.shape.in_channels must be 12, got 16"),
        (
            ["discriminator.shape.patch_size=[3, 1, 3]"],
            {},
            "discriminator.shape.patch_size must divide the latents [12, 4, 4], got [3, 1, 3]",
        ),
        (
            ["discriminator.clip_frames=4"],
            {},
            "discriminator.shape.patch_size must divide the windows of discriminator.clip_frames [4, 4, 4]",
        ),
        (
            ["discriminator.clip_frames=15"],
            {},
            "discriminator.clip_frames must be at most 12, the video's latent frames, got 15",
        ),
        (
            ["discriminator.kind=backbone", "discriminator.backbone.layers=[0, 5]"],
            {},
            "discriminator.backbone.layers must be below",
        ),
        (
            ["discriminator.clip_frames=9", "discriminator.num_clips=5"],
            {},
            "discriminator.num_clips must be at most 4, the places of 9 frames in a video of 12, got 5",
        ),
        (
            ["discriminator.num_clips=2"],
            {},
            "discriminator.num_clips must be 1 without discriminator.clip_frames, got 2",
        ),
        ([], {"shape": {"text_dim": 24}}, "student text_dim must be 32, the width of the text encoder text_encoder"),
        (
            ["discriminator.shape.text_dim=24"],
            {},
            "discriminator.shape.text_dim must be 32, the width of the text encoder text_encoder, got 24",
        ),
        (["encoders.text_path=nowhere"], {}, "text encoder folder nowhere must be a folder, which is missing"),
        ([], {"shape": {"text_len": 15}}, "encoders.text_len must be at most 15, the student's text_len, got 16"),
        (
            [],
            {"student": {"zero_optimization": {"stage": 3}}},
            "zero_optimization.stage3_param_persistence_threshold must be 0 (averages are swapped shard by shard), "
            "got None",
        ),
    ],
)
def test_what_does_not_fit_is_refused(plan: Plan, overrides: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        plan(*overrides, **changes)


def test_one_rollout_per_prompt_is_fine_with_the_batch_baseline(plan: Plan) -> None:
    assert plan("rollout.group_size=1", "nft.baseline=batch").prompts_per_rank == 8


def test_stage_2_needs_no_persistence_threshold(plan: Plan) -> None:
    assert plan(student={"zero_optimization": {"stage": 2}}).rollouts == 16


@pytest.mark.parametrize("missing", ["train", "heldout"])
def test_missing_shards_are_named(plan: Plan, tmp_path: Path, missing: str) -> None:
    folders = {split: tmp_path / split for split in ("train", "heldout")}
    for split, folder in folders.items():
        folder.mkdir()
        if split != missing:
            (folder / "index.json").write_text("{}")
    overrides = ["teacher.kind=shards", *(f"data.{split}_shards={folder}" for split, folder in folders.items())]
    message = f"shard folder {folders[missing]} must hold index.json, which is missing (write one: afd prepare)"
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(*overrides)
    (folders[missing] / "index.json").write_text("{}")
    assert plan(*overrides).rollouts == 16


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_an_output_folder_that_is_a_file_is_refused(plan: Plan, tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .* must be a folder, but .*taken is a file"):
        plan(f"output_dir={tmp_path / 'taken'}{below}")


def test_commits_of_adapters_hold_the_frozen_base_once() -> None:
    root = Path(__file__).parents[3]
    config = load_config(root / "configs" / "wan_14b.yaml")
    shape = StudentShape(**config.student.given_shape)

    def gib(rank: int) -> float:
        lora = config.student.lora.model_copy(update={"rank": rank})
        changed = config.model_copy(update={"student": config.student.model_copy(update={"lora": lora})})
        ds = [load_ds_config(root / "configs" / name) for name in ("zero3_h100.json", "zero2_discriminator_h100.json")]
        engines = (engine_settings(ds[0], (64, 1, 8)), engine_settings(ds[1], (64, 1, 8)))
        work = build_workload(changed, shape, latents=(16, 21, 60, 104), num_gpus=8, engines=engines, kernels="fused")
        return preflight._commit_bytes(work) / 2**30

    assert 26 < gib(0) / 15 < 30, "14 billion parameters at 30 bytes, of which 16 in averages and whole weights"
    assert 28 < gib(config.student.lora.rank) < 70, "the base's bfloat16 and the adapters at 30 bytes"


def test_a_full_disk_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_DISK_RESERVE_BYTES", 2**62)
    with pytest.raises(ConfigError, match=r"needs about 4294967296\.0 GiB, only .* GiB are free"):
        plan()


def test_a_missing_or_foreign_student_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match="do not exist"):
        plan_run(config, DS_STUDENT, DS_DISCRIMINATOR, world_size=1)
    save_file({"a": torch.zeros(1)}, tmp_path / "student.safetensors")
    with pytest.raises(ConfigError, match="do not hold a Wan transformer"):
        plan_run(config, DS_STUDENT, DS_DISCRIMINATOR, world_size=1)


def test_the_description_says_the_arithmetic_and_the_shapes(plan: Plan, tmp_path: Path) -> None:
    resolved = plan()
    text = describe_plan(make_config(tmp_path), resolved, DS_STUDENT)
    for expected in (
        "ranks 2; rollouts per step N = 16 = 4 prompts x G 4",
        "per rank: 2 prompts, 8 rollouts",
        "student:       micro 4 x accumulation 2 x ranks 2 = 16",
        "discriminator: micro 8 x accumulation 1 x ranks 2 = 16",
        f"ZeRO stage 3, {resolved.num_parameters:,} student parameters",
        "teacher latents x^T      [2, 12, 12, 4, 4]",
        "prompt embeddings        [2, 16, 32]",
        "rollouts x^S             [8, 12, 12, 4, 4]   4 chunks of 3 frames, times 1.0000, 0.7500",
        "gathered over ranks: [16]",
        "student tokens           [4, 384, 6]   layout [clean | noisy]",
        "velocities v, v_old, v_ref  [8, 12, 12, 4, 4]",
        "group_size: 4",
    ):
        assert expected in text
    supervised = make_config(tmp_path, "objective=sft")
    without_discriminator = describe_plan(supervised, plan("objective=sft"), DS_STUDENT)
    assert "discriminator: micro" not in without_discriminator
    assert "scores D" not in without_discriminator
    without_prior = describe_plan(make_config(tmp_path), plan("nft.prior_weight=0"), DS_STUDENT)
    assert "velocities v, v_old  [" in without_prior


def test_the_critics_parameters_may_not_persist_either(plan: Plan, tmp_path: Path) -> None:
    critic = DS_STUDENT | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 3}}
    (tmp_path / "critic.json").write_text(json.dumps(critic))
    score = f"dmd.real_score={tmp_path / 'student.safetensors'}"
    with pytest.raises(ConfigError, match=r"persistence_threshold of dmd\.ds_config must be 0 .*, got None"):
        plan("objective=dmd", score, f"dmd.ds_config={tmp_path / 'critic.json'}")


def test_the_description_is_the_objectives_own(plan: Plan, tmp_path: Path) -> None:
    score = [f"dmd.real_score={tmp_path / 'student.safetensors'}", f"dmd.ds_config={tmp_path / 'critic.json'}"]
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    (tmp_path / "critic.json").write_text(json.dumps(DS_STUDENT | optimizer))
    texts = {
        name: describe_plan(make_config(tmp_path), plan(f"objective={name}", *score), DS_STUDENT)
        for name in ("sft", "gan", "dmd")
    }
    lines = {
        "rollouts x^S": {"gan", "dmd"},
        "scores D": set(),
        "weights w ": set(),
        "noised states x_t, v*": {"sft"},
        "velocities v  [": {"sft"},
        "discriminator: micro 8": {"gan"},
        "critic:        micro 4 x accumulation 2 x ranks 2 = 16": {"dmd"},
        "critic, on top:": {"dmd"},
        "slope, on top:": {"gan", "dmd"},
        "by the discriminator": {"gan"},
        "by critic and real score": {"dmd"},
        "the student moves every 5 steps": {"dmd"},
        "velocities, on top:": set(),
    }
    for line, owners in lines.items():
        assert {name for name, text in texts.items() if line in text} == owners, line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["discriminator.vlm.path=null"], r"discriminator\.vlm\.path must name a Qwen2-VL or Qwen2\.5-VL folder"),
        (["discriminator.vlm.path=/nowhere"], "discriminator.vlm.path /nowhere must be a folder, which is missing"),
        (["objective=gan"], r"discriminator\.kind must be latent or backbone with objective = gan .*, got vlm"),
        (["discriminator.clip_frames=6"], r"discriminator\.clip_frames must be null with kind vlm .*, got 6"),
        (["discriminator.vlm.num_frames=14"], "must show a multiple of 2 frames, at least 2 and at most the clip's 12"),
        (["discriminator.vlm.init_from=/nowhere"], "init_from /nowhere must hold model_config.json of VideoAlign"),
    ],
)
def test_vlm_discriminators_are_checked(plan: Plan, vlm_folder: Path, overrides: list[str], message: str) -> None:
    vlm = ["discriminator.kind=vlm", f"discriminator.vlm.path={vlm_folder}", "discriminator.shape.text_dim=7"]
    plan(*vlm)  # the latent kind's dimensions do not matter
    with pytest.raises(ConfigError, match=message):
        plan(*vlm, *overrides)


def test_a_discriminator_that_is_not_built_is_neither_checked_nor_counted(plan: Plan) -> None:
    nonsense = ["discriminator.kind=vlm", "discriminator.clip_frames=99", "discriminator.shape.text_dim=7"]
    resolved = plan("objective=sft", *nonsense, discriminator={"train_batch_size": 32})
    assert resolved.discriminator_batch is None
    assert resolved.memory.held["discriminator (weights, optimizer)"] == 0
    assert "discriminator" not in resolved.memory.phases
    assert "decoding" not in resolved.memory.phases
    assert plan().memory.held["discriminator (weights, optimizer)"] > 0


def test_vlm_discriminator_needs_a_codec(vlm_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"encoders\.vae_path must name an AutoencoderKLWan folder .*, got none"):
        plan_vlm(VLMSection(path=vlm_folder), EncodersSection(codec="wan_vae"), VideoSection())
