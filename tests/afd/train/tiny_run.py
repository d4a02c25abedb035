"""What the workers of test_objectives.py and test_velocities.py share: JSON, configuration and batches."""

from pathlib import Path
from typing import Any

import torch

from afd.config import RunConfig
from afd.config_file import load_config
from afd.distributed import World, seeded_generator
from afd.types import VideoBatch

ROOT = Path(__file__).parents[3]
BATCH, GROUP = 8, 2  # rollouts of a step over all ranks, per prompt
SHAPE = (12, 6, 4, 4)  # C, F, H, W: two chunks


def adamw(lr: float) -> dict[str, Any]:
    """AdamW that needs nothing compiled."""
    return {"type": "AdamW", "params": {"lr": lr, "eps": 1e-4, "torch_adam": True}}


def ds_json(stage: int, optimizer: dict[str, Any], **more: Any) -> dict[str, Any]:
    """DeepSpeed's JSON of a ZeRO stage; `zero` adds to its zero_optimization, everything else to the top."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": BATCH,
        "gradient_clipping": 1.0,
        "optimizer": optimizer,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero | more.pop("zero", {}),
        **more,
    }


def configuration(student: Path, folder: Path, *overrides: str) -> RunConfig:
    """The quick start's configuration of a student's file, for clips of SHAPE."""
    fixed = (
        f"student.init_from={student}",
        f"rollout.group_size={GROUP}",
        f"video.num_frames={SHAPE[1]}",
        f"output_dir={folder / 'run'}",
    )
    return load_config(ROOT / "configs" / "chunk_wise.yaml", [*fixed, *overrides])


def batch_at(step: int, world: World) -> VideoBatch:
    """This rank's share of the step's prompts; sample i is the same wherever it is read."""
    prompts = BATCH // GROUP
    every = [step * prompts + i for i in range(prompts)]
    ids = every[world.rank * prompts // world.size : (world.rank + 1) * prompts // world.size]
    latents = torch.stack([torch.randn(SHAPE, generator=seeded_generator(1, i)) for i in ids])
    embeds = torch.stack([torch.randn(16, 32, generator=seeded_generator(2, i)) for i in ids])
    return VideoBatch(torch.tensor(ids), tuple(map(str, ids)), latents, embeds)
