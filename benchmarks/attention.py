"""Time every implementation of block-causal attention: `python benchmarks/attention.py`.

One run measures everything the default is chosen from: the matmul ceiling, all implementations with compiled
FlexAttention (also padded, as Self-Forcing calls it) and the chunk loop as baselines, forward and forward + backward,
and the KV-cached step. Useful FLOP/s count only pairs the layout shows. Every implementation runs in a worker process
of its own, so one that hangs or fails costs its own rows only, and the first call is a cold one. What is not installed
or does not fit gets a row that says so. Rows are appended to benchmarks/results/<device>-attention.csv as workers end;
table (.md) and plot (.png) are made from all of them, so a run may be split with --impl and --only.

With --write_defaults the order becomes the default on such devices (`afd_kernels/attention_defaults.csv`).

Without a GPU it runs the quick-start student's shape: that checks the benchmark, and is where the CPU default comes
from. `TRITON_INTERPRET=1 python benchmarks/attention.py --shapes smoke` walks every line it can on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attention_report import (
    BASELINES,
    PADDED,
    Row,
    append_rows,
    measured_defaults,
    not_measured,
    origin,
    read_rows,
    write_defaults,
    write_report,
)
from measurement import CPU_WARNING, measure_ceilings, peak_mib, time_us
from torch import Tensor
from torch.nn import functional as F
from triton.errors import TritonError

from afd_kernels import BlockCausalLayout, block_causal_attention, cached_attention
from afd_kernels.attention_defaults import TABLE, DefaultRow
from afd_kernels.attention_plans import compute_capability
from afd_kernels.testing import relative_error

IMPLS = (
    "reference", "chunks:sdpa", "chunks:cudnn", "chunks:flash2", "chunks:flash3", "chunks:hub2", "chunks:hub3",
    "flex", PADDED, "varlen:flash2", "varlen:flash3", "varlen:torch", "varlen:hub2", "varlen:hub3",
    "triton:tma", "triton:specialized", "triton:pointer",
)  # fmt: skip
CPU_IMPLS = ("reference", "chunks:sdpa", "flex")
CACHED_IMPLS = ("sdpa", "cudnn", "flash2", "flash3", "hub2", "hub3", "triton")


class CachedSize(NamedTuple):
    """A rollout's cache: frames, tokens per frame, heads, head dimension."""

    frames: int
    per_frame: int
    heads: int
    head_dim: int


CACHED_SIZES = {
    "wan": CachedSize(21, 1560, 12, 128), "tiny": CachedSize(15, 16, 4, 16), "smoke": CachedSize(7, 8, 1, 16),
}  # fmt: skip
MODELS = {"1.3B": (1, 12, 128), "14B": (1, 40, 128)}


@dataclass(frozen=True)
class Shape:
    """One problem: batch, heads, head dimension and the layout."""

    name: str
    batch: int
    heads: int
    head_dim: int
    layout: BlockCausalLayout


class Measured(NamedTuple):
    """What one stage of one implementation gave: (median, p20, p80) ms, useful FLOPs, MiB, seconds, relative error."""

    timing_ms: Sequence[float]
    flops: int
    peak_mib: float
    first_call_s: float
    error: float


def shapes(kind: str) -> list[Shape]:
    """`wan`: 1.3B and 14B, chunks of 3 frames and of 1, plain, windowed, teacher forcing; `tiny`: the quick start;
    `smoke`: as little as shows that everything runs."""
    if kind == "tiny":
        return [Shape("tiny 5x48 teacher", 16, 4, 16, BlockCausalLayout(15, 16, 3, teacher_forcing=True))]
    if kind == "smoke":
        return [Shape("smoke 2x32 teacher", 1, 1, 16, BlockCausalLayout(4, 16, 2, teacher_forcing=True))]
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
    mask = layout.block_mask(torch.device("cuda"), num_rows=rows)
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (F.pad(x, (0, 0, 0, rows - layout.num_tokens)) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask)[:, :, : layout.num_tokens]

    return call


def implementation(impl: str, layout: BlockCausalLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention of one implementation as a function of q, k, v."""
    if impl == PADDED:
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
    synchronize(device)
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


def measure_cached(kind: str, frames: int, label: str, impl: str, device: torch.device, ceiling: float) -> list[Row]:
    """One rollout step: a chunk of `frames` frames against all cached frames, or against a window with its sink."""
    size = CACHED_SIZES[kind]
    total, heads, head_dim, per_frame = size.frames * size.per_frame, size.heads, size.head_dim, size.per_frame
    ranges = ((0, total),) if label == "all" else ((0, per_frame), (total - 6 * per_frame, total))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, rows, head_dim, generator=generator, device=device, dtype=dtype)
        for rows in (frames * per_frame, total, total)
    )

    def step(impl: str = impl) -> Tensor:
        with torch.no_grad():
            return cached_attention(q, k, v, impl=impl, key_ranges=ranges)

    started = time.perf_counter()
    out = step()
    synchronize(device)
    first_call_s = time.perf_counter() - started
    error = relative_error(out, step("sdpa").double())
    flops = 4 * q.numel() * sum(end - start for start, end in ranges)
    timing = [x / 1e3 for x in time_us(step, device)]
    measured = Measured(timing, flops, peak_mib(step, device), first_call_s, error)
    return [make_row(cached_name(kind, frames, label), "forward", f"cached:{impl}", measured, ceiling)]


def cached_name(kind: str, frames: int, label: str) -> str:
    """Name of a cached step's rows."""
    return f"{'1.3B' if kind == 'wan' else kind} cached step, {frames} frame(s), {label}"


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_row(name: str, stage: str, impl: str, measured: Measured, ceiling: float) -> Row:
    """Fill in rates and where it was measured."""
    median_ms, p20_ms, p80_ms = measured.timing_ms
    rate = measured.flops / median_ms / 1e9
    return Row(
        name, stage, impl, median_ms, p20_ms, p80_ms, rate, rate / ceiling, measured.peak_mib, measured.first_call_s,
        measured.error, ceiling, "", *origin(),
    )  # fmt: skip


def jobs(impl: str, kind: str, only: str) -> dict[str, Callable[[torch.device, float], list[Row]]]:
    """What one worker measures: name of the shape -> function of (device, matmul ceiling)."""
    if impl.startswith("cached:"):
        name = impl.removeprefix("cached:")
        found = {
            cached_name(kind, frames, label): lambda device, ceiling, frames=frames, label=label: measure_cached(
                kind, frames, label, name, device, ceiling
            )
            for frames in (3, 1)
            for label in ("all", "window+sink")
        }
    else:
        found = {
            shape.name: lambda device, ceiling, shape=shape: measure(shape, impl, device, ceiling)
            for shape in shapes(kind)
        }
    return {name: job for name, job in found.items() if only in name}


def work(impl: str, kind: str, only: str) -> None:
    """Worker: measure one implementation on all shapes, one JSON line per row.

    A shape that fails (not installed, out of memory, does not compile) gets a row with the reason, and the next one
    is tried.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = measure_ceilings(device).matmul_tflop_s
    for name, job in jobs(impl, kind, only).items():
        torch.compiler.reset()  # every shape compiles for itself; the limit on recompilations is 8
        try:
            rows = job(device, ceiling)
        except (RuntimeError, ValueError, ImportError, TritonError) as error:
            rows = [not_measured(name, impl, f"{type(error).__name__}: {error}")]
        for row in rows:
            print("ROW " + json.dumps(asdict(row)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_worker(impl: str, kind: str, only: str, timeout_s: float) -> list[Row]:
    """Run one implementation in its own process; shapes it did not reach get rows that say why."""
    command = [sys.executable, __file__, "--worker", impl, "--shapes", kind, "--only", only]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=timeout_s)
        lines = errors.strip().splitlines()
        failure = f"worker ended with {process.returncode}: {lines[-1] if lines else 'no message'}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        failure = f"not reached within {timeout_s:.0f} s"
    found = [Row(**json.loads(line[4:])) for line in output.splitlines() if line.startswith("ROW ")]
    reached = {row.shape for row in found}
    return found + [not_measured(name, impl, failure) for name in jobs(impl, kind, only) if name not in reached]


def print_row(row: Row) -> None:
    """One line for a person who watches."""
    where = f"{row.impl:<19} {row.shape:<40} "
    if row.note:
        print(f"{where}not measured: {row.note}", flush=True)
        return
    rate = f"{row.median_ms:>9.3f} ms{row.useful_tflop_s:>8.1f} TFLOP/s{row.share_of_matmul:>7.1%} of matmul"
    cost = f"{row.peak_mib:>9.0f} MiB  first {row.first_call_s:.1f} s  error {row.error:.1e}"
    print(f"{where}{row.stage:<18}{rate}{cost}", flush=True)


def defaults_from(rows: list[Row], kind: str) -> list[DefaultRow]:
    """What this machine's rows on one kind of shapes say about its defaults."""
    names = {*jobs(BASELINES[1], kind, ""), *jobs("cached:sdpa", kind, "")}
    rows = [row for row in rows if row.shape in names]
    if not torch.cuda.is_available():
        return measured_defaults(rows, "cpu", 0, "float32")
    return measured_defaults(rows, rows[0].device, compute_capability(torch.device("cuda", 0)), "bfloat16")


def main() -> int:
    """Parse arguments, run the workers, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    is_cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", choices=("wan", "tiny", "smoke"), default="wan" if is_cuda else "tiny")
    parser.add_argument("--only", default="", help="measure only shapes whose name contains this, such as teacher")
    parser.add_argument("--impl", nargs="+", help="implementations to run; default: all")
    parser.add_argument("--timeout_s", type=float, default=600, help="for all shapes of one implementation")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--write_defaults", action="store_true", help="make the measured order the default on such devices"
    )
    parser.add_argument("--defaults", type=Path, default=TABLE, help="the table that --write_defaults writes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.shapes, arguments.only)
        return 0
    if arguments.write_defaults and arguments.shapes == "smoke":
        parser.error("--write_defaults must have the shapes wan or tiny, got smoke")
    if not is_cuda:
        print(CPU_WARNING)
    cached = tuple(f"cached:{impl}" for impl in CACHED_IMPLS)
    everything = CPU_IMPLS if arguments.shapes == "tiny" and not is_cuda else (*IMPLS, *cached)
    measured = False
    for impl in arguments.impl or everything:
        rows = run_worker(impl, arguments.shapes, arguments.only, arguments.timeout_s)
        for row in rows:
            print_row(row)
        if rows:
            append_rows(rows, arguments.results)
        measured = measured or any(not row.note for row in rows)
    if not measured:
        return 1
    stem, table = write_report(origin()[0], arguments.results)
    print(table)
    print(f"wrote {stem}.csv, .md and .png")
    if arguments.write_defaults:
        defaults = defaults_from(read_rows(stem.with_suffix(".csv")), arguments.shapes)
        if not defaults:
            print("no implementation was measured on every shape: the defaults stay as they are")
            return 1
        write_defaults(defaults, arguments.defaults)
        print(f"wrote {arguments.defaults}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
