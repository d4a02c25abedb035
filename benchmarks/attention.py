"""Time every implementation of block-causal attention: `python benchmarks/attention.py`.

One run measures everything the default is chosen from: the matmul ceiling, all implementations with compiled
FlexAttention (also padded, as Self-Forcing calls it) and the chunk loop as baselines, forward and forward + backward,
and the KV-cached step. Useful FLOP/s count only pairs the layout shows. Every implementation runs in a worker process
of its own, so one that hangs or fails costs its own rows only, and the first call is a cold one. Writes
benchmarks/results/<device>-attention.{csv,png,md}. Without a GPU it runs the quick-start student's shape: that checks
the benchmark, and is where the CPU default comes from.
"""

import argparse
import csv
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measurement import (
    CPU_WARNING,
    describe_commit,
    describe_device,
    describe_versions,
    measure_ceilings,
    peak_mib,
    time_us,
)
from torch import Tensor
from torch.nn import functional as F

from afd_kernels import BlockCausalLayout, block_causal_attention, cached_attention
from afd_kernels.testing import relative_error

IMPLS = (
    "chunks:sdpa", "chunks:cudnn", "chunks:flash2", "chunks:flash3", "chunks:hub", "flex", "flex_padded", "varlen",
    "triton:tma", "triton:specialized", "triton:pointer",
)  # fmt: skip
CPU_IMPLS = ("reference", "chunks:sdpa", "flex")
CACHED_IMPLS = ("sdpa", "cudnn", "flash2", "flash3", "triton")
MODELS = {"1.3B": (1, 12, 128), "14B": (1, 40, 128)}
BASELINES = ("flex", "chunks:sdpa")


@dataclass(frozen=True)
class Shape:
    """One problem: batch, heads, head dimension and the layout."""

    name: str
    batch: int
    heads: int
    head_dim: int
    layout: BlockCausalLayout


@dataclass(frozen=True)
class Row:
    """One measurement. Times in ms, FLOP/s in 1e12, memory in MiB; error is against the chunk loop."""

    shape: str
    stage: str
    impl: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    useful_tflop_s: float
    share_of_matmul: float
    peak_mib: float
    first_call_s: float
    error: float
    matmul_tflop_s: float
    device: str
    commit: str
    versions: str
    date: str


class Measured(NamedTuple):
    """What one stage of one implementation gave: (median, p20, p80) ms, useful FLOPs, MiB, seconds, relative error."""

    timing_ms: Sequence[float]
    flops: int
    peak_mib: float
    first_call_s: float
    error: float


def shapes(kind: str) -> list[Shape]:
    """`wan`: 1.3B and 14B, chunks of 3 frames and of 1, plain, windowed, teacher forcing; `tiny`: the quick start."""
    if kind == "tiny":
        return [Shape("tiny 5x48 teacher", 16, 4, 16, BlockCausalLayout(15, 16, 3, teacher_forcing=True))]
    found = []
    for model, size in MODELS.items():
        for chunk in (3, 1):
            layouts: tuple[tuple[str, dict[str, Any]], ...] = (
                ("plain", {}),
                ("window", {"window_frames": 2 * chunk, "sink_frames": 1}),
                ("teacher", {"teacher_forcing": True}),
                ("teacher window", {"teacher_forcing": True, "window_frames": 2 * chunk, "sink_frames": 1}),
            )
            for label, options in layouts:
                name = f"{model} {21 // chunk}x{1560 * chunk} {label}"
                found.append(Shape(name, *size, BlockCausalLayout(21, 1560, chunk, **options)))
    return found


def padded_flex(layout: BlockCausalLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention the way Self-Forcing calls it: inputs copied to the next multiple of 128 tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    rows = -(-layout.num_tokens // 128) * 128
    mask = layout.block_mask("cuda", num_rows=rows)
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (F.pad(x, (0, 0, 0, rows - layout.num_tokens)) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask)[:, :, : layout.num_tokens]

    return call


def implementation(impl: str, layout: BlockCausalLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention of one implementation as a function of q, k, v."""
    if impl == "flex_padded":
        return padded_flex(layout)
    return lambda q, k, v: block_causal_attention(q, k, v, layout, impl=impl)


def measure(shape: Shape, impl: str, device: torch.device, ceiling: float) -> list[Row]:
    """Forward and forward + backward of one implementation on one shape."""
    is_cuda = device.type == "cuda"
    generator = torch.Generator(device=device).manual_seed(0)
    size = (shape.batch, shape.heads, shape.layout.num_tokens, shape.head_dim)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    q, k, v, upstream = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(4))
    attend = implementation(impl, shape.layout)
    has_backward = is_cuda or not impl.startswith("flex")

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(inputs[0], inputs[1], inputs[2])
        return (out.detach(), *torch.autograd.grad(out, inputs, upstream))

    started = time.perf_counter()
    results = both() if has_backward else (forward(),)
    if is_cuda:
        torch.cuda.synchronize()
    first_call_s = time.perf_counter() - started
    expected = expected_results(shape, q, k, v, upstream)
    errors = [relative_error(got, want.double()) for got, want in zip(results, expected, strict=False)]
    del results, expected
    stages = [("forward", forward, False, errors[0])] + [("forward+backward", both, True, max(errors))] * has_backward
    sizes: dict[str, Any] = {"batch": shape.batch, "heads": shape.heads, "head_dim": shape.head_dim}
    rows = []
    for stage, function, with_backward, error in stages:
        flops = shape.layout.flops(**sizes) + with_backward * shape.layout.flops(**sizes, backward=True)
        timing = [x / 1e3 for x in time_us(function, device)]
        measured = Measured(timing, flops, peak_mib(function, device), first_call_s, error)
        rows.append(make_row(shape.name, stage, impl, measured, ceiling))
    return rows


def expected_results(shape: Shape, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of the chunk loop through PyTorch's dense attention."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = block_causal_attention(inputs[0], inputs[1], inputs[2], shape.layout, impl="chunks:sdpa")
    return (out.detach(), *torch.autograd.grad(out, inputs, upstream))


def measure_cached(impl: str, device: torch.device, ceiling: float) -> list[Row]:
    """One rollout step of Wan-1.3B: a chunk of 3 frames or 1 against 21 cached frames, or a window with its sink."""
    rows = []
    for frames in (3, 1):
        for label, ranges in (("all", ((0, 32760),)), ("window+sink", ((0, 1560), (32760 - 6 * 1560, 32760)))):
            generator = torch.Generator(device=device).manual_seed(0)
            q = torch.randn(1, 12, 1560 * frames, 128, generator=generator, device=device, dtype=torch.bfloat16)
            k, v = (
                torch.randn(1, 12, 32760, 128, generator=generator, device=device, dtype=torch.bfloat16)
                for _ in range(2)
            )

            def step(q: Tensor = q, k: Tensor = k, v: Tensor = v, ranges: Any = ranges, impl: str = impl) -> Tensor:
                with torch.no_grad():
                    return cached_attention(q, k, v, impl=impl, key_ranges=ranges)

            started = time.perf_counter()
            out = step()
            torch.cuda.synchronize()
            first_call_s = time.perf_counter() - started
            error = relative_error(out, step(impl="sdpa").double())
            flops = 4 * q.numel() * sum(end - start for start, end in ranges)
            timing = [x / 1e3 for x in time_us(step, device)]
            name = f"1.3B cached step, {frames} frame(s), {label}"
            measured = Measured(timing, flops, peak_mib(step, device), first_call_s, error)
            rows.append(make_row(name, "forward", impl, measured, ceiling))
    return rows


def make_row(name: str, stage: str, impl: str, measured: Measured, ceiling: float) -> Row:
    """Fill in rates and where it was measured."""
    median_ms, p20_ms, p80_ms = measured.timing_ms
    rate = measured.flops / median_ms / 1e9
    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Row(
        name, stage, impl, median_ms, p20_ms, p80_ms, rate, rate / ceiling, measured.peak_mib, measured.first_call_s,
        measured.error, ceiling, device, describe_commit(), describe_versions(),
        time.strftime("%Y-%m-%d", time.gmtime()),
    )  # fmt: skip


def work(impl: str, kind: str) -> None:
    """Worker: measure one implementation on all shapes, one JSON line per row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = measure_ceilings(device).matmul_tflop_s
    batches: list[Callable[[], list[Row]]] = [
        lambda shape=shape: measure(shape, impl, device, ceiling) for shape in shapes(kind)
    ]
    if impl.startswith("cached:"):
        batches = [lambda: measure_cached(impl.removeprefix("cached:"), device, ceiling)]
    for batch in batches:
        torch.compiler.reset()  # every shape compiles for itself; the limit on recompilations is 8
        for row in batch():
            print("ROW " + json.dumps(asdict(row)), flush=True)


def run_workers(impls: Sequence[str], kind: str, timeout_s: float) -> list[Row]:
    """Run every implementation in its own process; report those that fail and keep what they measured."""
    rows: list[Row] = []
    for impl in impls:
        command = [sys.executable, __file__, "--worker", impl, "--shapes", kind]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=timeout_s)
            failure = errors.strip().splitlines()[-1:] if process.returncode else []
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            failure = [f"did not end within {timeout_s:.0f} s"]
        found = [Row(**json.loads(line[4:])) for line in output.splitlines() if line.startswith("ROW ")]
        rows += found
        for row in found:
            where = f"{row.impl:<20}{row.shape:<36}{row.stage:<18}"
            rate = f"{row.median_ms:>9.3f} ms{row.useful_tflop_s:>8.1f} TFLOP/s{row.share_of_matmul:>7.1%} of matmul"
            print(f"{where}{rate}{row.peak_mib:>9.0f} MiB  first {row.first_call_s:.1f} s  error {row.error:.1e}")
        for line in failure:
            print(f"{impl:<20}not measured: {line}", flush=True)
    return rows


def default_table(rows: Sequence[Row]) -> str:
    """Markdown: forward + backward of every implementation, speed-ups over the baselines, the order that follows."""
    steps = [row for row in rows if row.stage == "forward+backward"]
    if not steps:
        return "Nothing was measured forward and backward."
    by_shape = {name: {r.impl: r for r in steps if r.shape == name} for name in dict.fromkeys(r.shape for r in steps)}
    lines = [f"{rows[0].device}, commit {rows[0].commit}, {rows[0].versions}, {rows[0].date}", ""]
    lines += [
        "| shape | implementation | ms | useful TFLOP/s | of matmul | x flex | x chunk loop |",
        "|---|" + "---|" * 6,
    ]
    for name, found in by_shape.items():
        for impl, row in sorted(found.items(), key=lambda item: item[1].median_ms):
            gains = [f"{found[base].median_ms / row.median_ms:.2f}" if base in found else "-" for base in BASELINES]
            rates = f"{row.median_ms:.3f} | {row.useful_tflop_s:.1f} | {row.share_of_matmul:.1%}"
            lines.append(f"| {name} | {impl} | {rates} | {' | '.join(gains)} |")
    teacher = {name: found for name, found in by_shape.items() if "teacher" in name}
    complete = set.intersection(*(set(found) for found in teacher.values())) if teacher else set()
    mean = {i: math.exp(sum(math.log(f[i].median_ms) for f in teacher.values()) / len(teacher)) for i in complete}
    order = ", ".join(sorted(mean, key=lambda impl: mean[impl]))
    lines += ["", f"Order by geometric mean over the teacher-forcing shapes: {order or 'no common implementation'}."]
    return "\n".join(lines)


def write_results(rows: Sequence[Row], folder: Path) -> Path:
    """Append the rows to the CSV, write the plot and the default table."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (re.sub(r"[^a-z0-9]+", "-", rows[0].device.lower()).strip("-") + "-attention")
    is_new = not stem.with_suffix(".csv").exists()
    with stem.with_suffix(".csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    stem.with_suffix(".md").write_text(default_table(rows) + "\n")
    plot(rows, stem.with_suffix(".png"))
    return stem


def plot(rows: Sequence[Row], path: Path) -> None:
    """Useful FLOP/s per shape and implementation, the matmul ceiling as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((row.shape, row.stage) for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.16 * len(groups) * len(impls)), layout="constrained")
    height = 0.8 / len(impls)
    for index, impl in enumerate(impls):
        rates = {(row.shape, row.stage): row.useful_tflop_s for row in rows if row.impl == impl}
        places = [place + index * height for place, group in enumerate(groups) if group in rates]
        axes.barh(places, [rates[group] for group in groups if group in rates], height=height, label=impl)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], [" ".join(group) for group in groups])
    axes.axvline(max(row.matmul_tflop_s for row in rows), color="black", linewidth=0.8, label="matmul ceiling")
    axes.invert_yaxis()
    axes.set_xlabel("useful TFLOP/s")
    note = "" if torch.cuda.is_available() else f"\n{CPU_WARNING}"
    axes.set_title(f"{rows[0].device}, commit {rows[0].commit}, {rows[0].versions}{note}", fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Parse arguments, run the workers, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    is_cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", choices=("wan", "tiny"), default="wan" if is_cuda else "tiny")
    parser.add_argument("--impl", nargs="+", help="implementations to run; default: all")
    parser.add_argument("--timeout_s", type=float, default=240, help="for all shapes of one implementation")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.shapes)
        return 0
    if not is_cuda:
        print(CPU_WARNING)
    everything = (*IMPLS, *(f"cached:{impl}" for impl in CACHED_IMPLS)) if is_cuda else CPU_IMPLS
    rows = run_workers(arguments.impl or everything, arguments.shapes, arguments.timeout_s)
    if not rows:
        return 1
    stem = write_results(rows, arguments.results)
    print(default_table(rows))
    print(f"wrote {stem}.csv, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
