"""What a run's discriminator is before its engine is built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config_file import load_config
from afd.distributed import World
from afd.train.discriminators import build_discriminator
from afd.train.ds_config import load_ds_config
from afd.train.preflight import plan_run


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [({}, torch.float32), ({"bf16": {"enabled": True, "check_grad_overflow": True}}, torch.bfloat16)],
)
def test_heads_have_the_precision_of_the_backbone_below_them(
    tiny_inputs: Path, tmp_path: Path, precision: dict[str, Any], dtype: torch.dtype
) -> None:
    # With stage 3 DeepSpeed casts nothing afterwards: the backbone is in shards by then.
    student = f"student.init_from={tiny_inputs / 'student.safetensors'}"
    overrides = [student, "rollout.group_size=2", "discriminator.kind=backbone", f"output_dir={tmp_path / 'run'}"]
    config = load_config(Path(__file__).parents[3] / "configs" / "chunk_wise.yaml", overrides)
    ds_student, ds_config = (load_ds_config(tiny_inputs / f"zero{stage}.json") for stage in (3, 2))
    ds_config |= precision
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    plan = plan_run(config, ds_student, ds_config, world_size=1)
    discriminator = build_discriminator(config, plan, world, ds_config=ds_config)
    assert {each.dtype for each in discriminator.parameters()} == {dtype}
