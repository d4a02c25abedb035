"""The measured half of scaling.py: whole AFD steps of the chunk-wise student on one or two CPU ranks.

Four processes live side by side and take turns, step by step, so that a slow minute of the machine hits every kind of
step alike: one rank alone; two one-rank runs at once that exchange nothing (what sharing a machine costs); two ranks
together; bare gathers between the two. Who is not at turn sleeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from afd.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
CHUNK_WISE = ROOT / "configs" / "chunk_wise.yaml"
PHASES = ("rollout", "discriminator", "update")
GATHERS = {"small": (2**10, 100), "large": (2**21, 10)}
"""Timed gathers: bytes of the whole tensor, calls in a row."""
Mode = Literal["alone", "pair", "together", "gathers"]
RUNS: dict[Mode, tuple[int, ...]] = {"alone": (8, 32), "pair": (8, 32), "together": (32, 64)}
"""Rollouts in all of the runs: 32 on two ranks is strong, 64 weak scaling."""
MEMBERS: dict[Mode, tuple[str, ...]] = {
    "alone": ("first",),
    "pair": ("first", "second"),
    "together": ("rank 0", "rank 1"),
    "gathers": ("rank 0", "rank 1"),
}
TURNS: tuple[tuple[Mode, int], ...] = (
    ("alone", 8), ("pair", 8), ("together", 32), ("gathers", 0), ("alone", 32), ("pair", 32), ("together", 64),
)  # fmt: skip
"""One round: what is done, and rollouts in all."""
_WARM_UP = 2  # rounds: DeepSpeed records the order of modules in the first steps
_TIMEOUT_S = 900


@dataclass(frozen=True)
class Found:
    """What the runs found.

    Attributes:
        seconds: of every timed step, one a round: mode -> rollouts in all -> samples.
        second: of a pair's other process, by rollouts.
        phases: seconds of every phase of two ranks' steps, by rollouts.
        moved: bulk collectives of two ranks' step, phase -> kind -> [calls, bytes], by rollouts.
        gather_s: seconds of one gather in a bare process group of two, by name in GATHERS.
    """

    seconds: dict[Mode, dict[int, list[float]]]
    second: dict[int, list[float]]
    phases: dict[int, dict[str, list[float]]]
    moved: dict[int, dict[str, dict[str, list[int]]]]
    gather_s: dict[str, list[float]]


def ds_config(stage: int, batch: int, ranks: int) -> dict[str, Any]:
    """A float32 JSON for `batch` rollouts over the ranks in one micro batch; prefetch off, so that traffic is exact."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1000000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero["stage3_prefetch_bucket_size"] = 0
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // ranks,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def run(rounds: int) -> Found:
    """Start all processes, wait, read what they found.

    Raises:
        RuntimeError: a process failed; its last words.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [str(Path(__file__).resolve()), "--folder", name, "--rounds", str(rounds)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        started: list[tuple[subprocess.Popen[bytes], Path]] = []
        for index, arguments in enumerate(([*common, "--name", "first"], [*common, "--name", "second"],
                                           [*torchrun, *common])):  # fmt: skip
            log = folder / f"log_{index}"
            with log.open("w") as file:
                command = [sys.executable, *arguments]
                process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            started.append((process, log))
        try:
            _watch(started, folder, len(TURNS) * (_WARM_UP + rounds))
        finally:
            for process, _ in started:
                process.terminate()
                process.wait()
        parts = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("first", "second", "rank 0")}
    return _put_together(parts)


def _watch(started: list[tuple[subprocess.Popen[bytes], Path]], folder: Path, turns: int) -> None:
    """Show the turns until all processes have ended well."""
    with tqdm(total=turns, desc="turns") as progress:
        while any(process.poll() is None for process, _ in started):
            progress.update(len({each.name.split()[0] for each in folder.glob("* done")}) - progress.n)
            for process, log in started:
                if process.poll():
                    raise RuntimeError(f"a measured run failed: {log.read_text()[-2000:]}")
            time.sleep(1.0)
    for process, log in started:
        if process.returncode:
            raise RuntimeError(f"a measured run failed: {log.read_text()[-2000:]}")


def _put_together(parts: dict[str, Any]) -> Found:
    """Every process's samples; JSON's keys are strings."""
    member: dict[Mode, str] = {"alone": "first", "pair": "first", "together": "rank 0"}
    seconds: dict[Mode, dict[int, list[float]]] = {
        mode: {batch: parts[name]["seconds"][mode][str(batch)] for batch in RUNS[mode]} for mode, name in member.items()
    }
    second = {batch: parts["second"]["seconds"]["pair"][str(batch)] for batch in RUNS["pair"]}
    two = parts["rank 0"]
    phases, moved = ({batch: two[key][str(batch)] for batch in RUNS["together"]} for key in ("phases", "moved"))
    return Found(seconds, second, phases, moved, two["gather_s"])


class Steps:
    """AFD steps at one batch on this rank.

    Args:
        batch: rollouts over all ranks.
        world: this process's place.
        output: folder of the run.
    """

    def __init__(self, batch: int, world: Any, output: Path) -> None:
        import torch

        from afd.distributed import seeded_generator
        from afd.train.builders import build_roles
        from afd.train.preflight import plan_run
        from afd.types import VideoBatch

        self.world, self.count = world, 0
        self.config = load_config(CHUNK_WISE, [f"output_dir={output}"])
        engines = [ds_config(stage, batch, world.size) for stage in (3, 2)]
        plan = plan_run(self.config, *engines, world_size=world.size)
        self.roles = build_roles(self.config, plan, *engines, world=world)
        ids = torch.arange(plan.prompts_per_rank) + world.rank * plan.prompts_per_rank
        generator, text = seeded_generator(world.rank), (plan.shape.text_len, plan.shape.text_dim)
        latents = torch.randn(len(ids), *plan.latents, generator=generator)
        prompts = torch.randn(len(ids), *text, generator=generator)
        self.batch = VideoBatch(ids, tuple(map(str, ids.tolist())), latents, prompts)

    def step(self, timer: Any) -> float:
        """Seconds of one more step."""
        from afd.train.objectives import afd_step

        start = time.perf_counter()
        afd_step(self.roles, self.batch, self.config, self.count, world=self.world, timer=timer)
        self.count += 1
        return time.perf_counter() - start

    def moved(self) -> dict[str, dict[str, list[int]]]:
        """Bulk collectives of one more step."""
        from collectives import Collectives

        from afd.train.objectives import StepTimer

        class Watched(StepTimer):
            def phase(self, name: str) -> Any:
                counter.phase = name
                return super().phase(name)

        with Collectives() as counter:
            self.step(Watched())
        return {phase: counter.bulk(phase) for phase in PHASES}


def time_gathers(world: Any) -> dict[str, float]:
    """Seconds of one gather between the ranks, outside any engine, by name in GATHERS."""
    import torch
    import torch.distributed as dist

    found: dict[str, float] = {}
    for name, (size, calls) in GATHERS.items():
        whole = torch.zeros(size // 4)
        piece = torch.zeros(whole.numel() // world.size)
        dist.all_gather_into_tensor(whole, piece)
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_gather_into_tensor(whole, piece)
        found[name] = (time.perf_counter() - start) / calls
    return found


def turns(folder: Path, name: str, rounds: int) -> Iterator[tuple[int, Mode, int]]:
    """A process's turns (round, mode, rollouts), each when the turn before it is done by all of its members.

    Raises:
        TimeoutError: another process did not come to an end.
    """
    every = [(each, *turn) for each in range(rounds) for turn in TURNS]
    for index, turn in enumerate(every):
        if name not in MEMBERS[turn[1]]:
            continue
        before = [folder / f"{index - 1} {each} done" for each in MEMBERS[every[index - 1][1]]] if index else []
        start = time.monotonic()
        while not all(each.exists() for each in before):
            if time.monotonic() - start > _TIMEOUT_S:
                raise TimeoutError(f"turn {index - 1} {every[index - 1]} took more than {_TIMEOUT_S} s")
            time.sleep(0.002)
        yield turn
        (folder / f"{index} {name} done").touch()


def measure(arguments: argparse.Namespace) -> None:
    """One process: its turns, then, of two ranks, a counted step."""
    import torch.distributed as dist

    from afd.distributed import close_world, init_world
    from afd.train.objectives import StepTimer

    world = init_world(_TIMEOUT_S)
    name = arguments.name or f"rank {world.rank}"
    modes: list[Mode] = [mode for mode in RUNS if name in MEMBERS[mode]]
    every = {batch: Steps(batch, world, arguments.folder / f"{name} {batch}") for batch in RUNS[modes[0]]}
    seconds: dict[str, dict[int, list[float]]] = {mode: {batch: [] for batch in every} for mode in modes}
    phases: dict[int, dict[str, list[float]]] = {batch: {} for batch in every}
    gathers: dict[str, list[float]] = {kind: [] for kind in GATHERS}
    for number, mode, batch in turns(arguments.folder, name, _WARM_UP + arguments.rounds):
        if world.size > 1:
            dist.barrier()
        if mode == "gathers":
            for kind, each in time_gathers(world).items():
                gathers[kind].append(each)
            continue
        timer = StepTimer()
        elapsed = every[batch].step(timer)
        if number >= _WARM_UP:
            seconds[mode][batch].append(elapsed)
            for phase, each in timer.seconds.items():
                phases[batch].setdefault(phase.removeprefix("time/").removesuffix("_s"), []).append(each)
    moved = {batch: steps.moved() for batch, steps in every.items()} if world.size > 1 else {}
    if world.is_main:
        found = {"seconds": seconds, "phases": phases, "moved": moved, "gather_s": gathers}
        (arguments.folder / f"{name}.json").write_text(json.dumps(found))
    close_world()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--name", help="of a one-rank process")
    parser.add_argument("--local_rank", type=int)
    measure(parser.parse_args())
