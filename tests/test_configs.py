"""The shipped DeepSpeed JSONs: valid for us and for DeepSpeed, in pairs that fit, and explained line by line."""

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.train import ds_config
from afd.train.ds_config import batch_arithmetic, load_ds_config

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json"))
PAIRS = [
    ("zero3.json", "zero2_discriminator.json", 2),
    ("zero3_h100.json", "zero2_discriminator_h100.json", 8),
    ("zero3_offload.json", "zero2_discriminator_h100.json", 8),
    ("zero3_h100_64.json", "zero2_discriminator_h100_64.json", 64),
]
OF_DEEPSPEED_ADAM = {"torch_adam", "adam_w_mode"}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", FILES)
def test_a_file_decides_everything_we_ask_for(name: str) -> None:
    config = load_ds_config(FOLDER / name)
    known = inspect.signature(torch.optim.AdamW).parameters.keys() | OF_DEEPSPEED_ADAM
    assert config["optimizer"]["params"].keys() <= known
    assert ("stage3_param_persistence_threshold" in config["zero_optimization"]) == ("zero3" in name)


@pytest.mark.parametrize(("student", "discriminator", "ranks"), PAIRS)
def test_a_pair_agrees_and_divides(student: str, discriminator: str, ranks: int) -> None:
    total = {batch_arithmetic(load_ds_config(FOLDER / name), ranks)[0] for name in (student, discriminator)}
    assert len(total) == 1
    assert {student, discriminator} <= set(FILES)
    assert {name for pair in PAIRS for name in pair[:2]} == set(FILES), "every file belongs to a pair"


@pytest.mark.slow
def test_deepspeeds_own_parser_takes_every_file_and_refuses_unknown_keys() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for name in FILES:
        config = json.loads((FOLDER / name).read_text())
        parsed = DeepSpeedConfig(dict(config))
        assert parsed.zero_config.stage == config["zero_optimization"]["stage"]
        assert parsed.gradient_clipping == config["gradient_clipping"]
        for section in ("zero_optimization", "bf16"):
            if section in config:
                with pytest.raises(ValueError, match="no_such_key"):
                    DeepSpeedConfig(config | {section: config[section] | {"no_such_key": 1}})
        offload = config["zero_optimization"].get("offload_optimizer")
        if offload:
            wrong = config["zero_optimization"] | {"offload_optimizer": offload | {"no_such_key": 1}}
            with pytest.raises(ValueError, match="no_such_key"):
                DeepSpeedConfig(config | {"zero_optimization": wrong})


@pytest.mark.slow
def test_the_fields_and_optimizers_that_we_know_are_deepspeeds() -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    for file, name in ds_config._MODELS.values():
        model = getattr(importlib.import_module(f"deepspeed.{file.removesuffix('.py').replace('/', '.')}"), name)
        fields = {each for key, field in model.model_fields.items() for each in (key, field.alias or key)}
        assert ds_config.deepspeed_fields(file, name) == fields
    of_mup = {"muadam", "muadamw", "musgd"}
    assert {each.lower() for each in ds_config._OPTIMIZERS} == set(DEEPSPEED_OPTIMIZERS) - of_mup


def test_a_top_level_key_that_deepspeed_would_ignore_is_refused_by_us(tmp_path: Path) -> None:
    wrong = json.loads((FOLDER / "zero3.json").read_text()) | {"gradient_cliping": 1.0}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="unknown key 'gradient_cliping', did you mean 'gradient_clipping'"):
        load_ds_config(tmp_path / "wrong.json")


def test_the_readme_explains_every_line_and_repeats_every_value() -> None:
    text = (FOLDER / "README.md").read_text()
    explained = re.findall(r"^- `([\w.]+)`: .{20}", text, flags=re.MULTILINE)
    values = {name: dict(leaves(json.loads((FOLDER / name).read_text()))) for name in FILES}
    assert sorted(explained) == sorted({key for each in values.values() for key in each})
    head, _, *rows = [line for line in text.split("## Values")[1].splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert sorted(f"{name}.json" for name in columns) == FILES
    table: dict[str, dict[str, Any]] = {f"{name}.json": {} for name in columns}
    for row in rows:
        key, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for name, cell in zip(columns, cells, strict=True):
            if cell != "-":
                table[f"{name}.json"][key.strip("`")] = json.loads(cell)
    assert table == values
