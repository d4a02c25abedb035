"""A compiled rollout computes what the plain one does, and compiles a handful of graphs whatever its length."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afd.config import LoRASection
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.rollout import SamplerTimes, rollout

MakeStudent = Callable[..., CausalStudent]
TIMES = SamplerTimes((1.0, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_compiled_rollout_changes_nothing(make_student: MakeStudent, rank: int) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    student = make_student(dtype=torch.float64, num_layers=4, chunk_frames=2, window_frames=4, sink_frames=1)
    if rank:
        add_lora(student, rank=rank, alpha=4, targets=LoRASection().targets)
        student.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 4, 20, 2, 3, generator=generator, dtype=torch.float64)
    prompt = torch.randn(1, 5, 6, generator=generator, dtype=torch.float64)
    plain = rollout(student, prompt, noise, TIMES)
    student.rollout_compile = "aot_eager"
    torch.testing.assert_close(rollout(student, prompt, noise, TIMES), plain, rtol=0, atol=1e-12)
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 8, "before and after attention, and again where shapes turn out to vary"
    torch.testing.assert_close(rollout(student, prompt, noise, TIMES), plain, rtol=0, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == graphs, "a second rollout compiles nothing"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_machine_code_for_the_cpu_changes_nothing(
    make_student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rollout.compile: default`, the real code generator: what a GPU gets, but for the target."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    student = make_student(chunk_frames=1, window_frames=2, sink_frames=1)
    generator = torch.Generator().manual_seed(0)
    noise, prompt = torch.randn(1, 2, 4, 5, 2, 3, generator=generator), torch.randn(1, 5, 6, generator=generator)
    plain = rollout(student, prompt, noise, TIMES)
    student.rollout_compile = "default"
    torch.testing.assert_close(rollout(student, prompt, noise, TIMES), plain, rtol=0, atol=2e-5)
