"""Adapters on the student: nothing changes at first, and only they train."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from afd.config import LoRASection
from afd.models.lora import add_lora, merged_adapters
from afd.models.student import CausalStudent
from afd.rollout import SamplerTimes, rollout

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


def randomised(student: CausalStudent, *, scale: float = 0.3) -> CausalStudent:
    """With adapters that do something."""
    add_lora(student, rank=3, alpha=6, targets=TARGETS)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return student


def base_of(student: CausalStudent) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in student.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_rollout_with_merged_adapters_is_the_same_and_the_base_comes_back(
    make_student: MakeStudent, dtype: torch.dtype, tolerance: float
) -> None:
    student = randomised(make_student(chunk_frames=1)).to(dtype)
    generator, times = torch.Generator().manual_seed(0), SamplerTimes((1.0, 0.5))
    noise = torch.randn(2, 2, 4, 3, 2, 3, generator=generator, dtype=dtype)
    prompt, before = torch.randn(2, 5, 6, generator=generator, dtype=dtype), base_of(student)
    separate = rollout(student, prompt, noise, times)
    with merged_adapters(student):
        merged = rollout(student, prompt, noise, times)
    torch.testing.assert_close(merged, separate, rtol=0, atol=tolerance)
    assert torch.equal(rollout(student, prompt, noise, times), separate)
    assert all(torch.equal(each, before[name]) for name, each in base_of(student).items())
    with pytest.raises(KeyboardInterrupt), merged_adapters(student):
        raise KeyboardInterrupt
    assert torch.equal(rollout(student, prompt, noise, times), separate)
    with merged_adapters(student, is_disposable=lambda parameter: True):
        assert torch.equal(rollout(student, prompt, noise, times), merged)
    assert not torch.equal(rollout(student, prompt, noise, times), separate), "the copy was not put back"


def test_merging_into_bf16_loses_updates_below_its_grid(make_student: MakeStudent) -> None:
    """Why it is a choice: a young adapter moves the student, merged into bf16 weights it hardly does."""
    exact = randomised(make_student(chunk_frames=1), scale=1e-4)
    student = randomised(make_student(chunk_frames=1), scale=1e-4).bfloat16()
    layer: Any = student.get_submodule("blocks.0.attn1.to_q")
    weight = exact.state_dict()["blocks.0.attn1.to_q.base_layer.weight"].bfloat16()
    with merged_adapters(student):
        moved = (layer.base_layer.weight != weight).float().mean()
    assert (layer.lora_B["default"].weight != 0).all()
    assert moved < 0.25


@pytest.mark.parametrize("target", ["to_w", "o_q", "norm_q", "q"])
def test_a_target_without_a_layer_is_named(make_student: MakeStudent, target: str) -> None:
    with pytest.raises(ValueError, match=rf"student\.lora\.targets: '{target}' matches no linear layer"):
        add_lora(make_student(), rank=2, alpha=2, targets=["to_q", target])
