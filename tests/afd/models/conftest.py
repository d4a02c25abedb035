"""Tiny random students, in any shape a test asks for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from afd.config import StudentShape
from afd.models.student import CausalStudent

MakeStudent = Callable[..., CausalStudent]


@pytest.fixture
def make_student() -> MakeStudent:
    """`make_student(seed=, dtype=, **shape)`: 4 channels, 2 blocks of width 24; every parameter random."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> CausalStudent:
        shape = {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_heads": 2,
            "head_dim": 12,
            "ffn_dim": 20,
            "freq_dim": 8,
            "text_len": 5,
            "text_dim": 6,
            **changes,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = CausalStudent(StudentShape(**shape)).to(dtype)
            for parameter in student.parameters():  # norms and biases as well, so that no term is trivial
                torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.3)
        return student

    return make
