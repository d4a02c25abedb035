"""A compiled rollout computes what the plain one does, and compiles a handful of graphs whatever its length."""

from collections.abc import Callable

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
