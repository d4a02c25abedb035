"""One rank of test_velocities.py: the same AFD steps with one gather and with three passes, gathers counted."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_run
import torch
from tiny_run import adamw, ds_json

from afd.config import RunConfig
from afd.config_file import dump_config
from afd.distributed import close_world, init_world
from afd.models.lora import is_old_adapter
from afd.train import objectives
from afd.train.builders import build_roles
from afd.train.checkpoint import load_checkpoint, read_student_weights, save_checkpoint
from afd.train.engines import bare_module, consolidated_weights
from afd.train.objectives import Roles, StepTimer, afd_step
from afd.train.preflight import plan_run
from afd.types import VideoBatch

MICRO, STEPS = 2, 2  # two micro batches a rank

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("student", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
world = init_world(600)


def ds_config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage3_max_reuse_distance": 0} | more.pop("zero", {})
    return ds_json(stage, adamw(1e-2), zero=zero, train_micro_batch_size_per_gpu=MICRO, **more)


def configuration(*overrides: str) -> RunConfig:
    fixed = ("discriminator.label_smoothing=0", "discriminator.r1_weight=0")
    return tiny_run.configuration(options.student, options.result.parent, *fixed, *overrides)


def batch_at(step: int) -> VideoBatch:
    return tiny_run.batch_at(step, world)


class GatherCount:
    """All-gathers of the student's weights, counted where DeepSpeed hands them to the process group."""

    def __init__(self, engine: Any) -> None:
        parameters: list[Any] = list(bare_module(engine).parameters())
        self.whole = sum(getattr(each, "ds_numel", each.numel()) for each in parameters)
        self.calls = self.elements = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside."""
        from deepspeed.comm import comm

        backend: Any = comm.cdb
        originals = {name: getattr(backend, name) for name in ("all_gather_into_tensor", "all_gather_coalesced")}

        def single(output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.note([output_tensor])
            return originals["all_gather_into_tensor"](output_tensor, *args, **kwargs)

        def coalesced(output_tensors: Any, *args: Any, **kwargs: Any) -> Any:
            self.note(output_tensors)
            return originals["all_gather_coalesced"](output_tensors, *args, **kwargs)

        backend.all_gather_into_tensor, backend.all_gather_coalesced = single, coalesced
        try:
            yield
        finally:
            for name, each in originals.items():
                setattr(backend, name, each)

    def note(self, outputs: list[torch.Tensor]) -> None:
        self.calls += 1
        self.elements += sum(each.numel() for each in outputs)

    @property
    def students(self) -> float:
        """How many times the whole student was gathered."""
        return self.elements / self.whole


def roles_for(config: RunConfig, **more: Any) -> Roles:
    student, discriminator = ds_config(3, **more), ds_config(2)
    plan = plan_run(config, student, discriminator, world_size=world.size)
    return build_roles(config, plan, student, discriminator, world=world)


def run(*overrides: str, **more: Any) -> dict[str, Any]:
    """A few AFD steps, the gathers of the last one, and what became of the weights."""
    config = configuration(*overrides)
    roles = roles_for(config, **more)
    counts = {"rollout": GatherCount(roles.student), "update": GatherCount(roles.student)}
    rows = []
    for step in range(STEPS):
        with watched(counts if step + 1 == STEPS else {}):
            metrics = afd_step(roles, batch_at(step), config, step, world=world, timer=StepTimer())
        rows.append({name: float(value) for name, value in metrics.items()})
    weights, old = consolidated_weights(roles.student, skip=is_old_adapter), roles.old.state_dict()
    return {
        "rows": rows,
        "students": {phase: each.students for phase, each in counts.items()},
        "calls": {phase: each.calls for phase, each in counts.items()},
        "weights": {name: each.flatten()[:5].tolist() for name, each in weights.items()},
        "old": {name: each.flatten()[:5].tolist() for name, each in old.items()},
        "dtype": str(next(bare_module(roles.student).parameters()).dtype),
        "masters": str(next(iter(weights[name] for name in old)).dtype) if world.is_main else "",
    }


def resumed(saved_as: str, resumed_as: str) -> dict[str, Any]:
    """The step after a commit, by the run that wrote it and by one that resumed it in another mode."""
    config, other = (configuration(*LORA, f"nft.velocities={mode}") for mode in (saved_as, resumed_as))
    roles, folder = roles_for(config), options.result.parent / f"{saved_as}_checkpoints"
    for step in range(2):
        afd_step(roles, batch_at(step), config, step, world=world, timer=StepTimer())

    def engines(roles: Roles) -> dict[str, Any]:
        assert roles.discriminator is not None
        return {"student": roles.student, "discriminator": roles.discriminator}

    def averages(roles: Roles) -> dict[str, Any]:
        return {"old": roles.old, "ema": roles.ema, "reference": roles.reference}

    path = save_checkpoint(
        folder, 2, engines=engines(roles), averages=averages(roles), state={}, config=dump_config(config)
    )
    again = roles_for(other)
    load_checkpoint(path, engines=engines(again), averages=averages(again))
    rows = [
        {name: float(value) for name, value in metrics.items()}
        for metrics in (
            afd_step(roles, batch_at(2), config, 2, world=world, timer=StepTimer()),
            afd_step(again, batch_at(2), other, 2, world=world, timer=StepTimer()),
        )
    ]
    return {"rows": rows, "names": sorted(read_student_weights(path))}


@contextmanager
def watched(counts: dict[str, GatherCount]) -> Iterator[None]:
    """Count the gathers of the rollout, and of everything that makes v, v_old, v_ref and the gradient."""
    phases = {"roll_out": "rollout", "lagging_velocities": "update", "update_student": "update"}
    originals = {name: getattr(objectives, name) for name in phases}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with counts[phases[name]].counting():
                return originals[name](*args, **kwargs)

        return call

    for name in phases if counts else ():
        setattr(objectives, name, counting(name))
    try:
        yield
    finally:
        for name, each in originals.items():
            setattr(objectives, name, each)


LORA = ("student.lora.rank=4", "student.lora.alpha=8", "student.gradient_checkpointing=true")
BF16 = {"bf16": {"enabled": True, "check_grad_overflow": True}}
OFFLOAD = {
    "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
cases: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": ((), {}),
    "LoRA": (LORA, {}),
    "LoRA, bf16": (LORA, BF16),
}
result: dict[str, Any] = {
    f"{name}, {mode}": run(f"nft.velocities={mode}", *overrides, **more)
    for name, (overrides, more) in cases.items()
    for mode in ("one_gather", "three_passes")
}
result["full, bf16"] = run("student.gradient_checkpointing=true", **BF16)
result["LoRA, offloaded"] = run(*LORA, **OFFLOAD)
batched = run("rollout.compile=aot_eager", "rollout.batch_size=4", *LORA)
result["LoRA, compiled and batched"] = batched
resumes = [resumed("one_gather", "three_passes"), resumed("three_passes", "one_gather")]
result = {"cases": result, "resumes": resumes}
if world.is_main:
    options.result.write_text(json.dumps(result))
close_world()
