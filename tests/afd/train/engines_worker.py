"""One rank of test_engines.py: real DeepSpeed engines of every stage beside plain torch on the whole batch."""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from afd.distributed import close_world, init_world, seeded_generator
from afd.train.ds_config import load_ds_config
from afd.train.engines import build_engine, consolidated_weights, gathered

CONFIGS = Path(__file__).parents[3] / "configs"
BATCH = 16

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()

world = init_world(120)
assert "deepspeed" not in sys.modules
mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)


def toy(seed: int, width: int = 7, out: int = 3) -> nn.Sequential:
    """A small module with a frozen layer in the middle, as a LoRA student has."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, out))
    layers[2].requires_grad_(False)
    return layers


def config_for(stage: int) -> dict[str, Any]:
    config = load_ds_config(CONFIGS / "zero3.json")
    config["train_batch_size"] = BATCH
    config["zero_optimization"]["stage"] = stage
    return config


def optimizer_for(module: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    params = {name: value for name, value in config["optimizer"]["params"].items() if name != "torch_adam"}
    return torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], **params)


def clipped_step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([each for each in module.parameters() if each.requires_grad], 1.0)
    optimizer.step()


def largest_difference(weights: dict[str, Tensor], module: nn.Module) -> float:
    if not world.is_main:
        return 0.0
    expected = module.state_dict()
    assert weights.keys() == expected.keys()
    return max((weights[name] - value).abs().max().item() for name, value in expected.items())


def stage_against_plain(stage: int) -> dict[str, Any]:
    config = config_for(stage)
    plain = toy(0)
    optimizer = optimizer_for(plain, config)
    engine = build_engine(toy(world.rank), config)  # rank 0's weights must win
    rollout_error, optimizer_numel = 0.0, 0
    for step in range(4):
        x = torch.randn(BATCH, 4, generator=seeded_generator(stage, step))
        with gathered(engine) as module, torch.no_grad():
            # Ranks may do different numbers of rollout forwards: none of them is a collective.
            for _ in range(1 + world.rank):
                rollout_error = max(rollout_error, (module(x) - plain(x)).abs().max().item())
        try:
            with gathered(engine):
                raise KeyError("a rollout failed")
        except KeyError:
            pass
        loss = engine(x[mine]).pow(2).mean()
        engine.backward(loss)
        engine.step()
        clipped_step(plain, optimizer, plain(x).pow(2).mean())
    optimizer_numel = sum(each.numel() for group in engine.optimizer.param_groups for each in group["params"])
    return {
        "rollout": rollout_error,
        "weights": largest_difference(consolidated_weights(engine), plain),
        "optimizer_numel": optimizer_numel,
        "skipped": engine.skipped_steps,
    }


def adversarial_pair() -> dict[str, float]:
    """A ZeRO-3 student and a ZeRO-2 discriminator, with a gradient through the discriminator (the GAN objective)."""
    student_config, critic_config = config_for(3), load_ds_config(CONFIGS / "zero2_discriminator.json")
    critic_config["train_batch_size"] = BATCH
    plain_student = toy(0)
    plain_critic = nn.Sequential(nn.Linear(3, 7), *list(toy(1, out=1))[1:])
    student = build_engine(copy.deepcopy(plain_student), student_config)
    critic = build_engine(copy.deepcopy(plain_critic), critic_config)
    plain_optimizers = optimizer_for(plain_student, student_config), optimizer_for(plain_critic, critic_config)
    frozen_names = [name for name, each in plain_critic.named_parameters() if not each.requires_grad]

    def set_trainable(module: nn.Module, flag: bool) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flag and name not in frozen_names)

    for step in range(3):
        x = torch.randn(BATCH, 4, generator=seeded_generator(7, step))
        real = torch.randn(BATCH, 3, generator=seeded_generator(8, step))
        with torch.no_grad():
            fake, plain_fake = student(x[mine]), plain_student(x)
        critic.backward(softplus(critic(fake) - critic(real[mine])).mean())
        critic.step()
        clipped_step(plain_critic, plain_optimizers[1], softplus(plain_critic(plain_fake) - plain_critic(real)).mean())
        set_trainable(critic.module, False)
        student.backward(-critic(student(x[mine])).mean())
        set_trainable(critic.module, True)
        student.step()
        clipped_step(plain_student, plain_optimizers[0], -plain_critic(plain_student(x)).mean())
    return {
        "student": largest_difference(consolidated_weights(student), plain_student),
        "critic": largest_difference(consolidated_weights(critic), plain_critic),
    }


def bf16_losses() -> list[float]:
    config = config_for(3)
    config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    engine = build_engine(toy(0), config, lr=1e-2)
    x = torch.randn(BATCH, 4, generator=seeded_generator(3)).bfloat16()
    losses = []
    for _ in range(8):
        loss = engine(x[mine]).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert engine.module[0].weight.dtype == torch.bfloat16
    return losses


def shipped_configs_parse() -> list[str]:
    """DeepSpeed's own parser accepts every shipped JSON."""
    from deepspeed.runtime.config import DeepSpeedConfig

    files = sorted(CONFIGS.glob("zero*.json"))
    for file in files:
        parsed = DeepSpeedConfig(load_ds_config(file))
        assert parsed.zero_optimization_stage == load_ds_config(file)["zero_optimization"]["stage"]
    return [file.name for file in files]


result = {
    "stages": {str(stage): stage_against_plain(stage) for stage in (0, 1, 2, 3)},
    "pair": adversarial_pair(),
    "bf16": bf16_losses(),
    "configs": shipped_configs_parse(),
    "has_loaded_the_compiler": "torch._inductor.compile_fx" in sys.modules,
}
if world.is_main:
    options.result.write_text(json.dumps(result))
close_world()
