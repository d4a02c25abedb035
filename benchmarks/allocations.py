"""Bytes that PyTorch's CPU allocator has given out, over all threads, at every moment of a profiled piece of work.

Adding up the profiler's own allocations and releases is not enough: its state belongs to a thread, and after an
asynchronous collective it may be gloo's thread that drops the last reference to a tensor. Such a tensor would count as
allocated for ever, or not, by a race. The allocator's total does not depend on threads.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def counting() -> Iterator[None]:
    """Let the allocator keep its total inside; memory allocated before is not part of it.

    The flag is the one PyTorch has for logging every allocation; without it the total stands still while no profiler
    runs, and leaves out other threads.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    flag.value = True
    try:
        yield
    finally:
        flag.value = False


def profiler() -> Any:
    """A profiler of allocations; use it as a context inside `counting`."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def allocated() -> int:
    """Bytes allocated now, of those `counting` has seen."""
    with profiler() as found:
        tensor = torch.empty(16)
    return _totals(found)[0][0][1] - tensor.nbytes


def peaks(found: Any) -> dict[str, int]:
    """Most bytes allocated during each `record_function("phase NAME")` (the last of a name) and, as `after`, at the
    end."""
    totals, spans = _totals(found)
    result = {name: max(total for at, total in totals if start <= at <= end) for name, (start, end) in spans.items()}
    return result | {"after": totals[-1][1]}


def _totals(found: Any) -> tuple[list[tuple[float, int]], dict[str, tuple[float, float]]]:
    """(time, bytes allocated) after every allocation and release, and the phases' (start, end)."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    records = [(each["ts"], each["args"]) for each in events if each["name"] == "[memory]"]
    mapped = {record["Addr"] for _, record in records if record["Total Reserved"]}  # files: not the allocator's
    totals = sorted((at, record["Total Allocated"]) for at, record in records if record["Addr"] not in mapped)
    phases = [each for each in events if each["name"].startswith("phase ")]
    phases.sort(key=lambda each: each["ts"])
    return totals, {each["name"].removeprefix("phase "): (each["ts"], each["ts"] + each["dur"]) for each in phases}
