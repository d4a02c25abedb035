"""One rank of test_checkpoint.py: a small adversarial run that draws from every random stream, saved and resumed.

Modes: `train` runs 6 steps, saving after 2 and 3; `resume` continues from the newest good commit to step 6, once per
damage; `refuse` shows another model and another world what they are told.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from afd.distributed import all_reduce_sum, barrier, close_world, init_world
from afd.train.averaging import ParameterAverage
from afd.train.checkpoint import Restored, find_commit, load_checkpoint, save_checkpoint
from afd.train.commit import RunLock, commit_name
from afd.train.ds_config import load_ds_config
from afd.train.engines import build_engine, consolidated_weights

CONFIGS = Path(__file__).parents[3] / "configs"
BATCH, LAST = 8, 6

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("mode", choices=["train", "resume", "refuse"])
parser.add_argument("folder", type=Path)
options = parser.parse_args()
world = init_world(120)
rows = BATCH // world.size


class Run:
    """A student around a frozen layer, a discriminator, an average, a fixed one, and a counter as progress."""

    def __init__(self, width: int = 7, *, base: float = 1.0, score: float = 0.0, more: Any = None) -> None:
        torch.manual_seed(world.rank)
        random.seed(world.rank)
        np.random.seed(world.rank)  # noqa: NPY002 - the legacy global stream is part of what resumes
        student_config = load_ds_config(CONFIGS / "zero3.json")
        critic_config = load_ds_config(CONFIGS / "zero2_discriminator.json")
        student_config["train_batch_size"] = critic_config["train_batch_size"] = BATCH
        for name, value in (more or {}).items():
            student_config[name] = critic_config[name] = value
        student = nn.Sequential(
            nn.Linear(4, width), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(width), nn.Linear(width, 3)
        )
        student[3].requires_grad_(False)
        nn.init.constant_(student.get_parameter("3.weight"), base)
        student.register_buffer("scale", torch.tensor(2.0))
        self.student = build_engine(student, student_config)
        self.critic = build_engine(nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1)), critic_config)
        self.average = ParameterAverage(self.student, decay=0.9, name="ema")
        target = nn.Linear(3, 2)
        nn.init.constant_(target.weight, score)
        self.fixed = {"real_score": ParameterAverage(target, decay=1.0, name="real score")}
        self.drawn = 0.0

    @property
    def engines(self) -> dict[str, Any]:
        return {"student": self.student, "discriminator": self.critic}

    def step(self, step: int) -> list[float]:
        """One step on numbers from torch's, numpy's and Python's global streams, and dropout."""
        x = torch.randn(rows, 4) + float(np.random.rand()) + random.random()  # noqa: NPY002
        real = torch.randn(rows, 3)
        with torch.no_grad(), self.average.applied():
            fake = self.student(x)
        critic_loss = softplus(self.critic(fake) - self.critic(real)).mean()
        self.critic.backward(critic_loss)
        self.critic.step()
        student_loss = (self.student(x) - real).pow(2).mean()
        self.student.backward(student_loss)
        self.student.step()
        self.average.update(step)
        self.drawn += x.sum().item()
        both = torch.stack([critic_loss.detach(), student_loss.detach()])
        return all_reduce_sum(both).tolist()

    def settings(self) -> list[tuple[float, list[float], float]]:
        groups = [group for engine in self.engines.values() for group in engine.optimizer.param_groups]
        return [(group["lr"], list(group["betas"]), group["weight_decay"]) for group in groups]

    def save(self, step: int, folder: Path = options.folder) -> None:
        save_checkpoint(
            folder,
            step,
            engines=self.engines,
            averages={"ema": self.average},
            state={"loader": {"epoch": step, "rank": world.rank}, "trainer": {"drawn": self.drawn}},
            config=f"step: {step}\n",
            fixed=self.fixed,
            keep=2,
        )

    def restore(self, path: Path, *, is_verified: bool = False) -> Restored:
        return load_checkpoint(
            path, engines=self.engines, averages={"ema": self.average}, is_verified=is_verified, fixed=self.fixed
        )

    def weights(self) -> dict[str, list[float]]:
        """Every number of the run that matters, exactly (float32 to decimal and back is lossless)."""
        parts = {"student": consolidated_weights(self.student), "critic": consolidated_weights(self.critic)}
        parts["ema"] = self.average.state_dict()
        return {
            f"{part}.{name}": each.flatten().tolist() for part, values in parts.items() for name, each in values.items()
        }


def message(action: Any) -> str:
    try:
        action()
    except (ValueError, OSError) as error:
        return str(error)
    return "no error"


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def train() -> dict[str, Any]:
    run = Run()
    losses = []
    for step in range(1, LAST + 1):
        losses.append(run.step(step))
        if step in (1, 2, 3):
            run.save(step)
    full = message(lambda: fill_disk(run))
    return {"losses": losses, "weights": run.weights(), "drawn": run.drawn, "full": full}


def fill_disk(run: Run) -> None:
    from afd.train import checkpoint

    checkpoint.RESERVE_BYTES = 2**60
    run.save(LAST)


def resume() -> dict[str, Any]:
    """Twice in one process, with fresh engines: from the newest commit, then with that one damaged."""
    outcome: dict[str, Any] = {}
    for case in ("whole", "damaged"):
        if case == "damaged" and world.is_main:
            flip_bit(
                options.folder / commit_name(3) / "student" / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
            )
        barrier()
        run = Run()
        path = find_commit(options.folder)
        assert path is not None
        restored = run.restore(path, is_verified=True)
        assert restored.state["loader"] == {"epoch": restored.step, "rank": world.rank}
        run.drawn = restored.state["trainer"]["drawn"]
        losses = [run.step(step) for step in range(restored.step + 1, LAST + 1)]
        outcome[case] = {
            "step": restored.step,
            "config": restored.config,
            "losses": losses,
            "weights": run.weights(),
            "drawn": run.drawn,
            "used": message(lambda path=path, run=run: run.restore(path)),
        }
    for case, other in (("base", Run(base=0.5)), ("real_score", Run(score=0.5))):
        outcome[case] = message(lambda other=other: other.restore(path, is_verified=True))
    params = {"lr": 0.5, "betas": [0.5, 0.6], "weight_decay": 0.25, "torch_adam": True}
    outcome["settings"] = resumed_settings(path, {"type": "AdamW", "params": params})
    run.save(2)
    return outcome


def resumed_settings(path: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
    """After a resume with another optimizer in the JSON, and in a run whose JSON has a scheduler."""
    other = Run(more={"optimizer": optimizer})
    other.restore(path, is_verified=True)
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 9, "warmup_type": "linear"}}
    first, then = Run(more={"scheduler": scheduler}), Run(more={"scheduler": scheduler})
    for step in (1, 2):
        first.step(step)
    first.save(2, options.folder / "scheduled")
    added = message(lambda: then.restore(path, is_verified=True))
    then.restore(options.folder / "scheduled" / commit_name(2), is_verified=True)
    return {"other": other.settings(), "first": first.settings(), "then": then.settings(), "added": added}


def refuse() -> dict[str, str]:
    commit = options.folder / commit_name(2)
    result = {"world": message(lambda: Run().restore(commit)), "model": message(lambda: Run(width=9).restore(commit))}
    run = Run()
    result["roles"] = message(lambda: load_checkpoint(commit, engines={"student": run.student}, averages={}))
    result["state"] = message(
        lambda: save_checkpoint(
            options.folder / "other",
            1,
            engines=run.engines,
            averages={},
            state={"bad": [1.0, np.float64(2)]},
            config="",
        )
    )
    return result


with RunLock(options.folder):
    result = {"train": train, "resume": resume, "refuse": refuse}[options.mode]()
if world.is_main:
    options.result.write_text(json.dumps(result))
close_world()
