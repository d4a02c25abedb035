"""Strong and weak scaling: real runs on 1 and 2 CPU ranks, and a simulator from 8 to 1,024 GPUs checked against them.

    python benchmarks/scaling.py              # both; writes benchmarks/results/scaling.csv and scaling.png
    python benchmarks/scaling.py --write_docs docs/planning.md   # the same, and what was measured into the page
    python benchmarks/scaling.py --simulate   # the simulator alone; keeps the measured lines

CPU ranks share one machine's memory and cores: their seconds say how good the model of a step is, not how a GPU
cluster scales. The simulator is calibrated without any step of two ranks: on one-rank runs at two batches, alone and in
unconnected pairs, and on gathers in a bare process group. Then it has to predict the steps of two ranks, within
TOLERANCE. The collectives, bytes and calls, are exact on any machine, and compared with the planner's formula.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from measurement import describe_commit, describe_versions
from scaling_runs import CHUNK_WISE, GATHERS, PHASES, ROOT, RUNS, Found, ds_config, run

from afd.config_file import load_config
from afd.models.encoders import latent_shape
from afd.planning.communication import Kind, plan_transfers, total_bytes, total_calls
from afd.planning.hardware import ASSUMED, GPUS, INTERCONNECTS, Gpu, Interconnect
from afd.planning.plan import Machine, make_plan, planned_shape
from afd.planning.refusals import batch_arithmetic
from afd.planning.simulation import Cluster, simulate
from afd.planning.timing import predict_step
from afd.planning.workload import Workload, build_workload, engine_settings

RESULTS = ROOT / "benchmarks" / "results"
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce")
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
STRONG_BATCH = 1024  # one rollout a GPU at the end; G = 1 divides everywhere
TOLERANCE = 0.15
"""A simulated step of two ranks may be this much shorter or longer than the measured one. Fixed before measuring."""


@dataclass(frozen=True)
class Row:
    """One line of the CSV; seconds per step, GB sent per rank and step, `kind` measured or simulated.

    `spread` is of the measured seconds, (80 % quantile - 20 % quantile) / median; `calls` are bulk collectives a step.
    """

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
    spread: float = math.nan
    calls: int = 0


def cpu_workload(batch: int, ranks: int) -> Workload:
    """The chunk-wise student at another batch."""
    config = load_config(CHUNK_WISE)
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


BEGIN, END = "<!-- begin: benchmarks/scaling.py --write_docs -->", "<!-- end: scaling -->"


def spread(samples: list[float]) -> float:
    """(80 % quantile - 20 % quantile) / median."""
    low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
    return (high - low) / statistics.median(samples)


def calibrated(seconds: dict[int, list[float]], network: Interconnect, *, apart: float) -> Cluster:
    """A CPU rank as the simulator's accelerator, from one-rank steps at two batches.

    The arithmetic rate makes the difference between the batches as long as measured; what is left over is the host's.

    Args:
        seconds: of the steps, by rollouts.
        network: gloo's.
        apart: mean of |a - b| over the mean step, of two processes that do the same: 2 / sqrt(pi) deviations.
    """
    free = 1e18
    unit = Gpu("cpu rank", 2**40, 1.0, free, free, 0.0)
    times = {batch: statistics.median(each) for batch, each in seconds.items()}
    products = {batch: predict_step(cpu_workload(batch, 1), unit, Interconnect("none", free, 0.0)).seconds
                for batch in times}  # fmt: skip
    small, large = sorted(times)
    rate = (products[large] - products[small]) / (times[large] - times[small])
    return Cluster(
        replace(unit, flops=rate, nvlink=network.node_bandwidth),
        network,
        jitter=apart * math.sqrt(math.pi) / 2,
        host_s=times[small] - products[small] / rate,
        overlaps=False,
    )


def calibrate(found: Found) -> dict[int, Cluster]:
    """The simulator's cluster for one rank alone and for two, without a look at the steps of two ranks."""
    network = gloo(found.gather_s)
    pair = {batch: each + found.second[batch] for batch, each in found.seconds["pair"].items()}
    both = [(a, b) for batch, each in found.seconds["pair"].items()
            for a, b in zip(each, found.second[batch], strict=True)]  # fmt: skip
    apart = statistics.fmean(2 * abs(a - b) / (a + b) for a, b in both)
    return {
        1: calibrated(found.seconds["alone"], network, apart=0.0),
        2: calibrated(pair, network, apart=apart),
    }


def gloo(gather_s: dict[str, list[float]]) -> Interconnect:
    """Latency and bandwidth of two ranks' gathers: a rank sends half of the whole tensor."""
    times = {name: statistics.median(each) for name, each in gather_s.items()}
    sent = (GATHERS["large"][0] - GATHERS["small"][0]) / 2
    return Interconnect("gloo", sent / (times["large"] - times["small"]) / ASSUMED.network, times["small"])


def check_collectives(found: Found, batch: int, ranks: int) -> tuple[float, float, int]:
    """(GB counted, GB planned) that a rank sends in a step, and planned calls.

    Raises:
        RuntimeError: bytes or calls are not those that were planned.
    """
    transfers = plan_transfers(cpu_workload(batch, ranks))
    moved = found.moved[batch] if ranks > 1 else {}
    formula = {
        phase: {kind: [total_calls(transfers[phase], kind), total_bytes(transfers[phase], kind)] for kind in KINDS}
        for phase in PHASES
    }
    if ranks > 1 and moved != formula:
        raise RuntimeError(f"{ranks} ranks, {batch} rollouts: counted {moved}, planned {formula}")
    every = [each for phase in transfers.values() for each in phase]
    rounds = {"all_gather": 0.5, "reduce_scatter": 0.5, "all_reduce": 1.0}  # of a ring of two
    counted = sum(rounds[kind] * size for each in moved.values() for kind, (_, size) in each.items())
    return counted / 1e9, sum(each.sent(ranks) for each in every) / 1e9, sum(each.calls for each in every)


def measured_rows(rounds: int) -> tuple[list[Row], list[str]]:
    """Strong (32 rollouts in all) and weak (32 a rank) scaling on real ranks, beside the simulator's seconds; and how
    the simulator was calibrated, in words."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    device = f"{cores} CPU cores, load {load:.1f} at the start"
    if load > 1.0:
        print(f"warning: load {load:.1f}: other processes compete for {cores} cores; only the volumes mean anything")
    found = run(rounds)
    clusters, rows = calibrate(found), []
    one = statistics.median(found.seconds["alone"][32])
    for scaling, ranks, batch in (("strong", 1, 32), ("strong", 2, 32), ("weak", 1, 32), ("weak", 2, 64)):
        samples = found.seconds["alone" if ranks == 1 else "together"][batch]
        seconds = statistics.median(samples)
        counted, planned, calls = check_collectives(found, batch, ranks)
        simulated = simulate(cpu_workload(batch, ranks), clusters[ranks]).seconds
        ideal = one if scaling == "weak" else one / ranks
        rows.append(
            Row("measured", "quick start", scaling, ranks, batch, seconds, batch / seconds, ideal / seconds, counted,
                planned, simulated, device, describe_commit(), spread(samples), calls)
        )  # fmt: skip
    return rows, [*describe_calibration(found, clusters), *describe_phases(found, clusters[2])]


def describe_calibration(found: Found, clusters: dict[int, Cluster]) -> list[str]:
    """What the simulator was told, and how sure it is."""
    lines = []
    for mode, batches in found.seconds.items():
        for batch, times in batches.items():
            use = "what is to be predicted" if mode == "together" else "calibrates"
            lines.append(
                f"{mode}, {batch} rollouts: median {statistics.median(times):.3f} s of {len(times)} steps, "
                f"spread {spread(times):.0%} ({use})"
            )
    for name, cluster in zip(("one rank", "each of two ranks"), clusters.values(), strict=True):
        rate = cluster.gpu.flops * cluster.assumed.matmul / 1e9
        lines.append(f"{name}: {rate:.2f} GFLOP/s in products, {cluster.host_s:.3f} s of host per step")
    network, gathers = clusters[2].network, found.gather_s
    lines.append(
        f"gloo: {network.latency * 1e6:.0f} us a call (spread {spread(gathers['small']):.0%}), "
        f"{network.node_bandwidth * ASSUMED.network / 1e9:.2f} GB/s; ranks differ by {clusters[2].jitter:.1%}"
    )
    return lines


def describe_phases(found: Found, cluster: Cluster) -> list[str]:
    """Where the seconds of two ranks go: measured beside simulated."""
    lines = []
    for batch in RUNS["together"]:
        guess = simulate(cpu_workload(batch, 2), cluster)
        times = {name: statistics.median(each) for name, each in found.phases[batch].items()}
        times["discriminator"] += times.pop("score")  # the planner's phase has both
        parts = ", ".join(f"{name} {times[name]:.3f} ({guess.phases[name]:.3f})" for name in PHASES)
        lines.append(
            f"2 ranks, {batch} rollouts, measured s (simulated s): {parts}; simulated host {cluster.host_s:.3f}, "
            f"collectives {guess.network_s:.3f}, waiting {guess.waiting_s:.3f}"
        )
    return lines


def document(path: Path, rows: list[Row], lines: list[str]) -> None:
    """Put what was measured between the page's markers.

    Raises:
        ValueError: it has none.
    """
    text, measured = path.read_text(), [row for row in rows if row.kind == "measured"]
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} must hold the markers {BEGIN} and {END}, got none")
    head, rest = text.split(BEGIN, 1)
    columns = "MB sent a rank and step: counted | formula | calls | s / step | spread | simulated | ratio"
    table = [
        f"Float32, {measured[0].device}, commit {measured[0].commit}:\n",
        f"| chunk-wise student | ranks | rollouts | {columns} |",
        "|---" * 10 + "|",
    ]
    for row in measured:
        simulated = f"{row.simulated_s:.2f} | {row.seconds / row.simulated_s:.2f}"
        table.append(
            f"| {row.scaling} | {row.ranks} | {row.rollouts} | {row.sent_gb * 1e3:.6f} | {row.formula_gb * 1e3:.6f} | "
            f"{row.calls} | {row.seconds:.2f} | {row.spread:.0%} | "
            + ("calibrated on it | - |" if row.ranks == 1 else f"{simulated} |")
        )
    block = [*table, "", f"**{verdict(rows)}.**", "", *(f"- {line}" for line in lines)]
    path.write_text(f"{head}{BEGIN}\n" + "\n".join(block) + f"\n{END}{rest.split(END, 1)[1]}")


def verdict(rows: list[Row]) -> str:
    """Whether the simulator met the two-rank steps, which it was not calibrated on."""
    checked = [row for row in rows if row.kind == "measured" and row.ranks > 1]
    if not checked:
        return "NOT validated: nothing was measured"
    ratios = {row.scaling: row.seconds / row.simulated_s for row in checked}
    words = ", ".join(f"{scaling} {ratio:.2f}" for scaling, ratio in ratios.items())
    met = all(abs(ratio - 1.0) <= TOLERANCE for ratio in ratios.values())
    return f"measured / simulated on two ranks: {words}: {'' if met else 'NOT '}validated within {TOLERANCE:.0%}"


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
    every = [each for phase in plan_transfers(work).values() for each in phase]
    sent, calls = sum(each.sent(ranks) for each in every) / 1e9, sum(each.calls for each in every)
    rate = batch / seconds
    efficiency = rate / ranks / first if first else 1.0
    return Row("simulated", *case[:2], ranks, batch, seconds, rate, efficiency, math.nan, sent, seconds,
               machine.gpu.name, describe_commit(), calls=calls)  # fmt: skip


def _measured_before(path: Path) -> list[Row]:
    """The measured lines of an earlier run."""
    if not path.is_file():
        return []
    types: dict[str, Any] = {"ranks": int, "rollouts": int, "calls": int, "spread": float} | dict.fromkeys(
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
    for x, row in zip(places, measured, strict=True):
        right.annotate(f"{row.seconds / row.simulated_s:.2f}", (x, max(row.seconds, row.simulated_s)), ha="center")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="the simulator alone; keeps the measured lines")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of every kind, in turn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write_docs", type=Path, metavar="FILE", help="also put what was measured into a page")
    arguments = parser.parse_args()
    if arguments.simulate and arguments.write_docs:
        parser.error("--write_docs writes what was measured: leave out --simulate")
    print(f"{describe_versions()}\nassumed: {ASSUMED}\ncluster: {Cluster(GPUS['h100-80g'], INTERCONNECTS['ib-400'])}")
    if arguments.simulate:
        measured, lines = _measured_before(arguments.out / "scaling.csv"), []
    else:
        measured, lines = measured_rows(arguments.rounds)
    rows = measured + simulated_rows()
    print("\n".join(lines))
    for row in rows:
        print(
            f"{row.kind:9} {row.student:22} {row.scaling:6} {row.ranks:5} ranks {row.rollouts:5} rollouts "
            f"{row.seconds:8.2f} s  simulated {row.simulated_s:8.2f} s  efficiency {row.efficiency:5.2f}  "
            + ("" if math.isnan(row.sent_gb) else f"counted {row.sent_gb * 1e3:.6f} MB, ")
            + f"planned {row.formula_gb * 1e3:.6f} MB a rank in {row.calls} calls"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(row.__dict__ for row in rows)
    plot(rows, arguments.out / "scaling.png")
    if arguments.write_docs is not None:
        document(arguments.write_docs, rows, lines)
    print(f"wrote {arguments.out / 'scaling.csv'} and scaling.png\n{verdict(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
