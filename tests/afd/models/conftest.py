"""Tiny random models in any shape a test asks for: students and diffusers' transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from afd.config import StudentShape
from afd.models.student import CausalStudent

MakeStudent = Callable[..., CausalStudent]
MakeTransformer = Callable[[StudentShape], Any]


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


@pytest.fixture
def make_transformer() -> MakeTransformer:
    """`make_transformer(shape)`: diffusers' transformer by its own constructor, not by what we write as config.json."""

    def make(shape: StudentShape) -> Any:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            patch_size=shape.patch_size,
            num_attention_heads=shape.num_heads,
            attention_head_dim=shape.head_dim,
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            text_dim=shape.text_dim,
            freq_dim=shape.freq_dim,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.num_layers,
            cross_attn_norm=shape.cross_attn_norm,
            eps=shape.eps,
            image_dim=shape.image_dim,
            added_kv_proj_dim=shape.dim if shape.image_dim else None,
            pos_embed_seq_len=shape.image_tokens,
        )

    return make
