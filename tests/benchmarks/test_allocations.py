"""Allocated bytes are counted over all threads, and files that are only mapped are not."""

import runpy
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.autograd.profiler import record_function

ALLOCATIONS: Any = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "allocations.py"))  # no package


def test_a_release_by_another_thread_counts_and_a_mapped_file_does_not(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2**20)}, tmp_path / "x.safetensors")
    with ALLOCATIONS["counting"]():
        before = ALLOCATIONS["allocated"]()
        kept = torch.empty(2**12)
        with ALLOCATIONS["profiler"]() as profiler:
            with record_function("phase first"):
                box = [torch.empty(2**20)]
            mapped = load_file(tmp_path / "x.safetensors")
            thread = threading.Thread(target=box.clear)  # as gloo's thread does at the end of a collective
            thread.start()
            thread.join()
            with record_function("phase second"):
                kept = kept + kept
    assert mapped["x"].numel() == 2**20
    peaks = {name: size - before for name, size in ALLOCATIONS["peaks"](profiler).items()}
    small = kept.nbytes
    assert peaks == {"first": 4 * 2**20 + small, "second": 2 * small, "after": small}
