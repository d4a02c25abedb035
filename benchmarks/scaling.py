"""Strong and weak scaling: real runs on 1 and 2 CPU ranks, and a simulator from 8 to 1,024 GPUs checked against them.

    python benchmarks/scaling.py              # both; writes benchmarks/results/scaling.csv and scaling.png
    python benchmarks/scaling.py --simulate   # the simulator alone

CPU ranks share one machine's memory and cores: their seconds say how good the model of a step is, not how a GPU
cluster scales. The bytes that collectives move are exact on any machine, and compared with the planner's formula.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from measurement import describe_commit, describe_versions

from afd.config_file import load_config
from afd.models.encoders import latent_shape
from afd.planning.communication import Kind, plan_transfers, total_bytes, total_calls
from afd.planning.hardware import ASSUMED, GPUS, INTERCONNECTS, Gpu, Interconnect
from afd.planning.plan import Machine, make_plan, planned_shape
from afd.planning.refusals import batch_arithmetic
from afd.planning.simulation import Cluster, simulate
from afd.planning.timing import predict_step
from afd.planning.workload import Workload, build_workload, engine_settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
PHASES = ("rollout", "discriminator", "update")
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce")
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
STRONG_BATCH = 1024  # one rollout a GPU at the end; G = 1 divides everywhere


@dataclass(frozen=True)
class Row:
    """One line of the CSV; seconds per step, GB sent per rank and step, `kind` measured or simulated."""

    kind: str
    student: str
    scaling: str
    ranks: int
    rollouts: int
    seconds: float
    rollouts_per_s: float
    efficiency: float
    sent_gb: float
    formula_gb: float
    simulated_s: float
    device: str
    commit: str


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


def cpu_workload(batch: int, ranks: int) -> Workload:
    """The quick start's student at another batch."""
    config = load_config(QUICKSTART)
    pair = [ds_config(stage, batch, ranks) for stage in (3, 2)]
    student, discriminator = (engine_settings(each, batch_arithmetic(each, ranks)) for each in pair)
    return build_workload(
        config,
        planned_shape(config),
        latents=latent_shape(config.encoders, config.video),
        num_gpus=ranks,
        engines=(student, discriminator),
        kernels="eager",
    )


def measure(arguments: argparse.Namespace) -> None:
    """One rank of a measured run: seconds by phase, bulk collectives by phase, the speed of a gather."""
    import torch
    import torch.distributed as dist
    from collectives import Collectives

    from afd.distributed import close_world, init_world, seeded_generator
    from afd.train.builders import build_roles
    from afd.train.objectives import StepTimer, afd_step
    from afd.train.preflight import plan_run
    from afd.types import VideoBatch

    class Watched(StepTimer):
        def __init__(self, counter: Collectives) -> None:
            super().__init__()
            self.counter = counter

        def phase(self, name: str) -> Any:
            self.counter.phase = name
            return super().phase(name)

    world = init_world(600)
    config = load_config(QUICKSTART, [f"output_dir={arguments.result.parent / 'run'}"])
    student, discriminator = (ds_config(stage, arguments.batch, world.size) for stage in (3, 2))
    plan = plan_run(config, student, discriminator, world_size=world.size)
    roles = build_roles(config, plan, student, discriminator, world=world)
    ids = torch.arange(plan.prompts_per_rank) + world.rank * plan.prompts_per_rank
    generator, text = seeded_generator(world.rank), (plan.shape.text_len, plan.shape.text_dim)
    latents = torch.randn(len(ids), *plan.latents, generator=generator)
    batch = VideoBatch(ids, tuple(map(str, ids.tolist())), latents, torch.randn(len(ids), *text, generator=generator))
    seconds = []
    for step in range(1 + arguments.steps):  # the first is a warm-up
        start = time.perf_counter()
        afd_step(roles, batch, config, step, world=world, timer=StepTimer())
        seconds.append(time.perf_counter() - start)
    with Collectives() as collectives:
        afd_step(roles, batch, config, 1 + arguments.steps, world=world, timer=Watched(collectives))
    piece = torch.zeros(2**19)
    whole, gathers = torch.zeros(2**19 * world.size), []
    for _ in range(9 if world.size > 1 else 0):
        start = time.perf_counter()
        dist.all_gather_into_tensor(whole, piece)
        gathers.append(time.perf_counter() - start)
    if world.is_main:
        moved = {phase: collectives.bulk(phase) for phase in PHASES}
        gather = statistics.median(gathers) if gathers else math.nan
        found = {"seconds": seconds[1:], "moved": moved, "gather_s": gather, "gather_bytes": whole.numel() * 4}
        arguments.result.write_text(json.dumps(found))
    close_world()


def run_ranks(ranks: int, batch: int, steps: int) -> dict[str, Any]:
    """Start the measured run on 1 or 2 ranks and read what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        arguments = ["--worker", str(result), "--batch", str(batch), "--steps", str(steps)]
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), *arguments]
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks failed: {done.stderr[-2000:]}")
        return json.loads(result.read_text())


def calibrated(seconds: float, batch: int) -> Gpu:
    """A CPU rank as the simulator's accelerator: its arithmetic rate makes one rank's step as long as measured."""
    work, free = cpu_workload(batch, 1), 1e18
    unit = Gpu("cpu", 2**40, 1.0, free, free, 0.0)
    products = predict_step(work, unit, Interconnect("none", free, 0.0)).seconds
    return replace(unit, name="cpu rank", flops=products / seconds)


def measured_rows(steps: int) -> list[Row]:
    """Strong (32 rollouts in all) and weak (32 a rank) scaling on real ranks, beside the simulator's seconds."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    device = f"{cores} CPU cores, load {load:.1f} at the start"
    if load > 1.0:
        print(f"warning: load {load:.1f}: other processes compete for {cores} cores; only the volumes mean anything")
    runs = {(1, 32): run_ranks(1, 32, steps), (2, 32): run_ranks(2, 32, steps), (2, 64): run_ranks(2, 64, steps)}
    alone = statistics.median(runs[1, 32]["seconds"])
    gpu, two = calibrated(alone, 32), runs[2, 32]
    speed = two["gather_bytes"] / 2 / two["gather_s"] / ASSUMED.network
    gpu = replace(gpu, nvlink=speed)
    network = Interconnect("gloo", speed, 0.0)
    print(
        f"calibrated on one rank: {gpu.flops * ASSUMED.matmul / 1e9:.2f} GFLOP/s in products; "
        f"gloo {speed / 1e9:.2f} GB/s"
    )
    rows: list[Row] = []
    for scaling, ranks, batch in (("strong", 1, 32), ("strong", 2, 32), ("weak", 1, 32), ("weak", 2, 64)):
        found, work = runs[ranks, batch], cpu_workload(batch, ranks)
        seconds = statistics.median(found["seconds"])
        transfers = plan_transfers(work)
        formula = {
            phase: {kind: [total_calls(transfers[phase], kind), total_bytes(transfers[phase], kind)] for kind in KINDS}
            for phase in PHASES
        }
        if ranks > 1 and found["moved"] != formula:
            raise RuntimeError(f"{scaling}, {ranks} ranks: counted {found['moved']}, planned {formula}")
        planned = sum(each.sent(ranks) for phase in transfers.values() for each in phase)
        rounds = {"all_gather": 0.5, "reduce_scatter": 0.5, "all_reduce": 1.0}
        counted = sum(rounds[kind] * size for each in found["moved"].values() for kind, (_, size) in each.items())
        simulated = simulate(work, Cluster(gpu, network, jitter=0.02)).seconds
        ideal = alone if scaling == "weak" else alone / ranks
        rows.append(
            Row("measured", "quick start", scaling, ranks, batch, seconds, batch / seconds, ideal / seconds,
                counted / 1e9 if ranks > 1 else 0.0, planned / 1e9, simulated, device, describe_commit())
        )  # fmt: skip
    return rows


def simulated_rows() -> list[Row]:
    """8 to 1,024 H100s: weak scaling at 8 rollouts a GPU, strong scaling at 1,024 rollouts."""
    rows: list[Row] = []
    for path, overrides, network, scaling in (
        ("wan_1_3b_self_forcing.yaml", [], "ib-400", "weak"),
        ("wan_14b.yaml", [], "ib-400", "strong"),
        ("wan_14b.yaml", ["student.lora.rank=0"], "ib-400", "weak"),
        ("wan_14b.yaml", ["student.lora.rank=0"], "ethernet-100", "weak"),
    ):
        config = load_config(ROOT / "configs" / path, ["rollout.group_size=1", "nft.baseline=batch", *overrides])
        name = f"{'14B' if '14b' in path else '1.3B'} {'all' if overrides else 'LoRA'}, {network}"
        first = 0.0
        for ranks in GPU_COUNTS:
            batch = 8 * ranks if scaling == "weak" else STRONG_BATCH
            rows.append(_simulated(config, (name, scaling, network), ranks, batch, first))
            first = first or rows[-1].rollouts_per_s / ranks
    return rows


def _simulated(config: Any, case: tuple[str, str, str], ranks: int, batch: int, first: float) -> Row:
    names = ("zero3_h100.json" if ranks == 8 else "zero3_h100_64.json", "zero2_discriminator_h100.json")
    pair = [json.loads((ROOT / "configs" / name).read_text()) | {"train_batch_size": batch} for name in names]
    machine = Machine(GPUS["h100-80g"], INTERCONNECTS[case[2]], ranks)
    work = make_plan(config, planned_shape(config), (pair[0], pair[1]), machine).workload
    seconds = simulate(work, Cluster(machine.gpu, machine.network)).seconds
    sent = sum(each.sent(ranks) for phase in plan_transfers(work).values() for each in phase) / 1e9
    rate = batch / seconds
    efficiency = rate / ranks / first if first else 1.0
    return Row("simulated", *case[:2], ranks, batch, seconds, rate, efficiency, math.nan, sent, seconds,
               machine.gpu.name, describe_commit())  # fmt: skip


def _measured_before(path: Path) -> list[Row]:
    """The measured lines of an earlier run."""
    if not path.is_file():
        return []
    types: dict[str, Any] = {"ranks": int, "rollouts": int} | dict.fromkeys(
        ("seconds", "rollouts_per_s", "efficiency", "sent_gb", "formula_gb", "simulated_s"), float
    )
    with path.open() as file:
        lines = [line for line in csv.DictReader(file) if line["kind"] == "measured"]
    values: list[dict[str, Any]] = [{name: types.get(name, str)(text) for name, text in line.items()} for line in lines]
    return [Row(**each) for each in values]


def plot(rows: list[Row], path: Path) -> None:
    """Efficiency over GPUs, and measured against simulated seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for student, scaling in dict.fromkeys((row.student, row.scaling) for row in rows if row.kind == "simulated"):
        chosen = [row for row in rows if (row.student, row.scaling) == (student, scaling)]
        counts, efficiencies = [row.ranks for row in chosen], [row.efficiency for row in chosen]
        left.plot(counts, efficiencies, "-o", label=f"{student}, {scaling}", markersize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(GPU_COUNTS, [str(count) for count in GPU_COUNTS])
    left.set_ylim(0.0, 1.05)
    left.set_xlabel("H100s")
    left.set_ylabel("throughput per GPU, 8 H100s = 1")
    left.set_title("simulated, not measured")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    measured = [row for row in rows if row.kind == "measured"]
    names = [f"{row.scaling}\n{row.ranks} rank{'s' * (row.ranks > 1)}" for row in measured]
    places = range(len(measured))
    right.bar([x - 0.2 for x in places], [row.seconds for row in measured], 0.4, label="measured")
    right.bar([x + 0.2 for x in places], [row.simulated_s for row in measured], 0.4, label="simulated")
    right.set_xticks(list(places), names)
    right.set_ylabel("seconds per step")
    right.set_title("quick start on " + (measured[0].device if measured else "CPU ranks"), fontsize=10)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="the simulator alone; keeps the measured lines")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every measured run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", dest="result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result is not None:
        measure(arguments)
        return 0
    print(f"{describe_versions()}\nassumed: {ASSUMED}\ncluster: {Cluster(GPUS['h100-80g'], INTERCONNECTS['ib-400'])}")
    kept = _measured_before(arguments.out / "scaling.csv") if arguments.simulate else measured_rows(arguments.steps)
    rows = kept + simulated_rows()
    for row in rows:
        print(
            f"{row.kind:9} {row.student:22} {row.scaling:6} {row.ranks:5} ranks {row.rollouts:5} rollouts "
            f"{row.seconds:8.2f} s  simulated {row.simulated_s:8.2f} s  efficiency {row.efficiency:5.2f}  "
            + ("" if math.isnan(row.sent_gb) else f"counted {row.sent_gb * 1e3:.6f} MB, ")
            + f"planned {row.formula_gb * 1e3:.6f} MB a rank"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(row.__dict__ for row in rows)
    plot(rows, arguments.out / "scaling.png")
    print(f"wrote {arguments.out / 'scaling.csv'} and scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
