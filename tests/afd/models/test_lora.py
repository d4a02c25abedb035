"""Adapters on the student: nothing changes at first, and only they train."""

from collections.abc import Callable

import pytest
import torch

from afd.config import LoRASection
from afd.models.lora import add_lora
from afd.models.student import CausalStudent

MakeStudent = Callable[..., CausalStudent]
TARGETS = LoRASection().targets


def velocity(student: CausalStudent) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 4, 2, 2, 3, generator=generator), torch.randn(1, 5, 6, generator=generator)
    return student(latents, torch.full((1, 2), 0.5), prompt, clean=latents)


def test_fresh_adapters_change_nothing(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1)
    with torch.no_grad():
        before = velocity(student)
        add_lora(student, rank=3, alpha=6, targets=TARGETS)
        assert torch.equal(velocity(student), before)


def test_only_adapters_train_and_each_linear_layer_has_one(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1)
    add_lora(student, rank=3, alpha=6, targets=TARGETS)
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trainable)
    # Per block: q, k, v, out of two attentions and two of the feed-forward, with A and B each.
    assert len(trainable) == 2 * 2 * (2 * 4 + 2)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_one_step_moves_the_output(make_student: MakeStudent, is_checkpointed: bool) -> None:
    student = make_student(chunk_frames=1)
    add_lora(student, rank=3, alpha=6, targets=TARGETS)
    student.gradient_checkpointing = is_checkpointed
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    before = velocity(student)
    before.square().mean().backward()
    silent = [n for n, p in student.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert silent == []
    optimizer.step()
    assert not torch.equal(velocity(student), before)


def test_the_update_is_alpha_over_r_times_b_a(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1)
    weight = student.state_dict()["blocks.0.attn1.to_q.weight"].clone()
    add_lora(student, rank=2, alpha=8, targets=["to_q"])
    layer = student.get_submodule("blocks.0.attn1.to_q")
    a, b = (student.state_dict()[f"blocks.0.attn1.to_q.lora_{side}.default.weight"] for side in "AB")
    torch.nn.init.normal_(b)
    x = torch.randn(3, weight.shape[1])
    bias = student.state_dict()["blocks.0.attn1.to_q.base_layer.bias"]
    expected = x @ (weight + 8.0 / 2 * b @ a).T + bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("target", ["to_w", "o_q", "norm_q", "q"])
def test_a_target_without_a_layer_is_named(make_student: MakeStudent, target: str) -> None:
    with pytest.raises(ValueError, match=rf"student\.lora\.targets: '{target}' matches no linear layer"):
        add_lora(make_student(), rank=2, alpha=2, targets=["to_q", target])
