"""A VLM discriminator in the plan: its own parameters and products, equal to the real module's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from afd.cli import main
from afd.config import RunConfig
from afd.config_file import load_config
from afd.models.vlm_builder import build_vlm_discriminator, plan_vlm
from afd.planning.hardware import GPUS, INTERCONNECTS
from afd.planning.memory import plan_memory
from afd.planning.operations import Matmul, forward_flops
from afd.planning.plan import Machine, make_plan, planned_shape
from afd.planning.vlm import VLMPlan, plan_discriminator_vlm

ROOT = Path(__file__).parents[3]
BATCH = 2


def config_of(folder: Path, *overrides: str) -> RunConfig:
    keys = {"path": folder, "min_pixels": 256, "max_pixels": 256, "lora_rank": 4, "text_len": 90}
    given = [f"discriminator.vlm.{name}={value}" for name, value in keys.items()]
    return load_config(ROOT / "configs" / "chunk_wise.yaml", ["discriminator.kind=vlm", *given, *overrides])


def planned(config: RunConfig) -> VLMPlan:
    plan = plan_discriminator_vlm(config)
    assert plan is not None
    return plan


@pytest.mark.parametrize("vision", ["frozen", "lora", "full"])
@pytest.mark.parametrize("family", ["vlm_folder", "vlm25_folder"])
def test_parameters_and_products_equal_the_modules(family: str, vision: str, request: pytest.FixtureRequest) -> None:
    config = config_of(request.getfixturevalue(family), f"discriminator.vlm.vision={vision}")
    section, plan = config.discriminator.vlm, planned(config)
    shown = plan_vlm(section, config.encoders, config.video)
    module = build_vlm_discriminator(section, shown, dtype=torch.float32)
    parameters = list(module.parameters())
    assert plan.total == sum(each.numel() for each in parameters)
    assert plan.trained == sum(each.numel() for each in parameters if each.requires_grad)

    clips, text = torch.rand(BATCH, 3, len(shown.frames), *shown.size), torch.ones(BATCH, section.text_len).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(clips, text)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    counted = sum(flops for name, flops in counts.items() if "attention" not in str(name))
    every = [each for learns in (False, True) for each in plan.operations(BATCH, learns=learns)]
    products = forward_flops([each for each in every if isinstance(each, Matmul)])
    assert products == pytest.approx(counted, rel=0.01), "but for the products of rotary angles"
    assert bool(plan.operations(1, learns=False)) == (vision == "frozen")


def test_afd_plan_counts_the_vlm_and_says_what_it_does_not_know(
    vlm_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = config_of(vlm_folder)
    keys = config.discriminator.vlm
    overrides = ["discriminator.kind=vlm", f"discriminator.vlm.path={vlm_folder}", "discriminator.vlm.lora_rank=4"]
    overrides += [f"discriminator.vlm.{name}={getattr(keys, name)}" for name in ("min_pixels", "max_pixels")]
    command = ["plan", "--config", "configs/chunk_wise.yaml", "--ds_config", "configs/zero3.json", "--gpus", "1"]
    assert main([*command, *overrides]) == 0
    text = capsys.readouterr().out
    assert f"discriminator {planned(config).total:,}" in text
    assert "| decoding |" in text
    assert "seconds of decoding are not counted" in text
    assert main([*command, "discriminator.kind=vlm"]) == 2
    assert "discriminator.vlm.path must name a Qwen2-VL or Qwen2.5-VL folder" in capsys.readouterr().err


def test_one_vae_decodes_for_the_vlm_and_for_the_samples(vlm_folder: Path) -> None:
    config, file = config_of(vlm_folder), json.loads((ROOT / "configs" / "zero3.json").read_text())
    machine = Machine(GPUS["h100-80g"], INTERCONNECTS["ib-400"], 1)
    work = make_plan(config, planned_shape(config), (file, file), machine).workload
    with_vae = replace(work, uses_vae=True)
    assert plan_memory(with_vae).host == plan_memory(work).host == {}
    assert plan_memory(replace(with_vae, vlm=None)).host, "without a VLM it decodes samples alone"


def test_other_discriminators_are_none_of_its_business() -> None:
    assert plan_discriminator_vlm(load_config(ROOT / "configs" / "chunk_wise.yaml")) is None
