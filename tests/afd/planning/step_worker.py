"""One rank of test_measured.py: real steps on real engines, their memory and their collectives by phase."""

import argparse
import gc
import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function

from afd.config import StudentShape
from afd.config_file import load_config
from afd.distributed import close_world, init_world, seeded_generator
from afd.models.student import CausalStudent
from afd.models.weights import save_student
from afd.train.builders import build_roles
from afd.train.dmd_objective import dmd_step
from afd.train.gan_objective import gan_step
from afd.train.objectives import StepTimer, afd_step
from afd.train.preflight import plan_run
from afd.train.sft_objective import sft_step
from afd.types import VideoBatch

STEPS = {"afd": afd_step, "sft": sft_step, "gan": gan_step, "dmd": dmd_step}
ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
ALLOCATIONS: Any = runpy.run_path(str(BENCHMARKS / "allocations.py"))  # no package
Collectives: Any = runpy.run_path(str(BENCHMARKS / "collectives.py"))["Collectives"]

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("cases", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
torch.set_num_threads(1)  # every further thread has scratch memory of its own, which is not the step's
world = init_world(600)


class Phases(StepTimer):
    """Marks the phases in the profile, or tells a counter about them."""

    def __init__(self, counter: Any = None) -> None:
        super().__init__()
        self.counter = counter

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.counter is not None:
            self.counter.phase = name
        gc.collect()  # garbage in cycles goes when Python likes: it is not the step's
        with record_function(f"phase {name}"), super().phase(name):
            yield


def batch_of(prompts: int, latents: tuple[int, ...], shape: StudentShape) -> VideoBatch:
    ids = [world.rank * prompts + i for i in range(prompts)]
    clips = torch.stack([torch.randn(latents, generator=seeded_generator(1, i)) for i in ids])
    embeds = torch.stack([torch.randn(shape.text_len, shape.text_dim, generator=seeded_generator(2, i)) for i in ids])
    return VideoBatch(torch.tensor(ids), tuple(map(str, ids)), clips, embeds)


def measure(index: int, case: dict[str, Any]) -> dict[str, Any]:
    shape = StudentShape(**case["shape"])
    path = options.result.parent / f"student_{index}_{world.rank}.safetensors"
    save_student(CausalStudent(shape), path, dtype=torch.float32, note={})
    critic = options.result.parent / f"critic_{index}_{world.rank}.json"
    critic.write_text(json.dumps(case["ds_critic"]))
    fixed = [f"student.init_from={path}", f"output_dir={options.result.parent / 'run'}"]
    fixed += [f"dmd.real_score={path}", f"dmd.ds_config={critic}"]
    config = load_config(ROOT / "configs" / "chunk_wise.yaml", [*fixed, *case["overrides"]])
    ds_student, ds_discriminator = case["ds_student"], case["ds_discriminator"]
    one_step = STEPS[config.objective]
    gc.collect()
    with ALLOCATIONS["counting"]():
        before = ALLOCATIONS["allocated"]()
        plan = plan_run(config, ds_student, ds_discriminator, world_size=world.size)
        roles = build_roles(config, plan, ds_student, ds_discriminator, world=world)
        batch = batch_of(plan.prompts_per_rank, plan.latents, shape)
        one_step(roles, batch, config, 0, world=world, timer=Phases())
        gc.collect()
        with ALLOCATIONS["profiler"]() as profiler:
            one_step(roles, batch, config, 1, world=world, timer=Phases())
            gc.collect()
    peaks = {phase: size - before for phase, size in ALLOCATIONS["peaks"](profiler).items()}
    with Collectives() as collectives:
        timer = Phases(collectives)
        one_step(roles, batch, config, 2, world=world, timer=timer)
    KEPT.append(roles)  # engines are never freed here: their memory would be missing from the next case's balance
    phases = [name.removeprefix("time/").removesuffix("_s") for name in timer.seconds]
    moved = {phase: collectives.bulk(phase) for phase in phases if phase != "score"}  # a handful of scores
    return {"peaks": peaks, "collectives": moved}


KEPT: list[Any] = []
results = [measure(index, case) for index, case in enumerate(json.loads(options.cases.read_text()))]
if world.is_main:
    options.result.write_text(json.dumps(results))
close_world()
