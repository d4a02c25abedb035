"""What every benchmark shares: the device and its measured ceilings, timing with quantiles, the table, CSV and plot.

Numbers mean something on a GPU only; on a CPU the same code runs at tiny sizes to show that it works.
"""

import csv
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

CPU_WARNING = "CPU run: these numbers check that the benchmark works. They say nothing about a GPU."
QUANTILES = [0.5, 0.2, 0.8]


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured in this process.

    Attributes:
        copy_gb_s: bytes read plus written per second by one large device-to-device copy, 1e9 bytes/s.
        matmul_tflop_s: bf16 (CPU: fp32) matrix product, 1e12 FLOP/s.
    """

    copy_gb_s: float
    matmul_tflop_s: float


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds, bytes are the fewest the operation can move."""

    op: str
    stage: str
    size: str
    shape: str
    dtype: str
    impl: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_s: float
    share_of_copy: float
    peak_mib: float
    device: str
    commit: str
    versions: str


def describe_device(device: torch.device) -> str:
    """Human-readable device name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def describe_versions() -> str:
    """torch, triton and CUDA versions in one string."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return f"torch {torch.__version__}, triton {triton_version}, cuda {torch.version.cuda}"


def describe_commit() -> str:
    """Short hash of the checked-out commit, with a plus sign when files differ from it."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def time_us(function: Callable[[], object], device: torch.device) -> tuple[float, float, float]:
    """(median, 20 %, 80 %) of one call in microseconds; on CUDA with a flushed L2 cache (`triton.testing.do_bench`)."""
    if device.type == "cuda":
        from triton.testing import do_bench

        # A rough mean first: long functions get ten samples nevertheless.
        mean_ms: Any = do_bench(function, warmup=1, rep=1)
        samples_ms: Any = do_bench(function, warmup=50, rep=int(max(200, 10 * mean_ms)), quantiles=QUANTILES)
        median, low, high = (1e3 * x for x in samples_ms)
        return median, low, high
    function()
    samples = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        samples.append(1e6 * (time.perf_counter() - start))
    return tuple(torch.tensor(samples).quantile(torch.tensor(QUANTILES)).tolist())  # type: ignore[return-value]


def peak_mib(function: Callable[[], object], device: torch.device) -> float:
    """Most memory allocated during one call beyond what was there before, MiB; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure the copy and matmul ceilings of this device, now."""
    is_cuda = device.type == "cuda"
    count, side, dtype = (2**30, 8192, torch.bfloat16) if is_cuda else (2**22, 512, torch.float32)
    source = torch.empty(count, device=device, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    copy_us = time_us(lambda: target.copy_(source), device)[0]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    matmul_us = time_us(lambda: a @ b, device)[0]
    return Ceilings(copy_gb_s=2e-3 * count / copy_us, matmul_tflop_s=2e-6 * side**3 / matmul_us)


def print_table(rows: Sequence[Row]) -> None:
    """Print the columns a person compares."""
    print(f"{'op':<22}{'stage':<18}{'size':<6}{'impl':<9}{'median us':>11}{'p20':>10}{'p80':>10}", end="")
    print(f"{'GB/s':>9}{'of copy':>9}{'peak MiB':>10}")
    for row in rows:
        times = f"{row.median_us:>11.1f}{row.p20_us:>10.1f}{row.p80_us:>10.1f}"
        rates = f"{row.gb_s:>9.0f}{row.share_of_copy:>9.1%}{row.peak_mib:>10.1f}"
        print(f"{row.op:<22}{row.stage:<18}{row.size:<6}{row.impl:<9}{times}{rates}")


def append_csv(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Append records of the same columns to a CSV file; the header comes with the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(records)


def write_results(rows: Sequence[Row], folder: Path, name: str) -> tuple[Path, Path]:
    """Write <device>-<name>.csv and .png into `folder`; rows are appended to an existing CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", rows[0].device.lower()).strip("-")
    table, plot = folder / f"{slug}-{name}.csv", folder / f"{slug}-{name}.png"
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    _plot(rows, plot)
    return table, plot


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((row.op, row.stage, row.size) for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.4 * len(groups)), layout="constrained")
    height = 0.8 / len(impls)
    for index, impl in enumerate(impls):
        shares = {(row.op, row.stage, row.size): row.share_of_copy for row in rows if row.impl == impl}
        positions = [place + index * height for place, group in enumerate(groups) if group in shares]
        axes.barh(positions, [100 * shares[group] for group in groups if group in shares], height=height, label=impl)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], [" ".join(group) for group in groups])
    axes.axvline(100, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("fewest bytes / time, % of the measured copy bandwidth")
    note = f"\n{CPU_WARNING}" if "cuda None" in rows[0].versions else ""
    axes.set_title(f"{rows[0].device}, commit {rows[0].commit}, {rows[0].versions}{note}", fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
