"""Counted FLOPs and parameters of the real models equal the planner's, to the last one."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from afd.config import BackboneSection, DiscriminatorShape, LoRASection, StudentShape
from afd.models.backbone_discriminator import BackboneDiscriminator, backbone_shape
from afd.models.discriminator import LatentDiscriminator
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.planning.operations import (
    backbone_pass,
    discriminator_pass,
    forward_flops,
    rollout_passes,
    slope_pass,
    student_pass,
    training_flops,
)
from afd.planning.parameters import (
    backbone_tensors,
    count_backbone,
    count_discriminator,
    count_student,
    discriminator_tensors,
    student_tensors,
)
from afd.planning.shapes import WAN_SHAPES
from afd.rollout import SamplerTimes, rollout

SHAPE = StudentShape(
    in_channels=4, out_channels=4, patch_size=(1, 2, 2), num_layers=2, num_heads=2, head_dim=12, ffn_dim=56,
    freq_dim=16, text_len=5, text_dim=10, chunk_frames=2,
)  # fmt: skip
LATENTS = (4, 6, 4, 6)
LORA = LoRASection(rank=3, alpha=3)
# torch counts every attention kernel except the CPU's, with these very formulas.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counted(run: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, *LATENTS), torch.rand(batch, LATENTS[1]), torch.randn(batch, 5, 10)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("lora", [None, LORA, LoRASection(rank=2, targets=("attn1.to_q", "ffn.net.2"))])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_chunk_frames": 1, "chunk_frames": 5},
        {"window_frames": 4, "sink_frames": 1, "cross_attn_norm": False},
    ],
)
def test_student_flops_equal_a_counted_forward_and_backward(
    changes: dict[str, Any], lora: LoRASection | None, checkpointed: bool
) -> None:
    shape = SHAPE.model_copy(update=changes)
    student = CausalStudent(shape)
    if lora:
        add_lora(student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    student.gradient_checkpointing = checkpointed
    noisy, t, prompt = inputs(3)
    operations = student_pass(shape, LATENTS, batch=3, lora=lora)
    with torch.no_grad():
        assert forward_flops(operations) == counted(lambda: student(noisy, t, prompt, clean=noisy))
    expected = counted(lambda: student(noisy, t, prompt, clean=noisy).sum().backward())
    assert training_flops(operations, is_checkpointed=checkpointed) == expected
    assert count_student(shape, lora).total == sum(p.numel() for p in student.parameters())
    assert count_student(shape, lora).trained == sum(p.numel() for p in student.parameters() if p.requires_grad)
    tensors = student_tensors(shape, lora)
    every = [*tensors.before, *(tensors.block + tensors.adapter) * shape.num_layers, *tensors.after]
    assert sorted(every) == sorted(p.numel() for p in student.parameters())


def test_a_score_of_noised_clips_alone_costs_what_is_counted() -> None:
    student = CausalStudent(SHAPE)
    noisy, t, prompt = inputs(3)
    operations = student_pass(SHAPE, LATENTS, batch=3, teacher_forcing=False)
    with torch.no_grad():
        assert forward_flops(operations) == counted(lambda: student(noisy, t, prompt))
    expected = counted(lambda: student(noisy, t, prompt).sum().backward())
    assert training_flops(operations, is_checkpointed=False) == expected


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("changes", [{}, {"window_frames": 3, "sink_frames": 1}])
def test_rollout_flops_equal_a_counted_rollout(changes: dict[str, Any], lora: LoRASection | None) -> None:
    shape = SHAPE.model_copy(update=changes)
    student = CausalStudent(shape)
    if lora:
        add_lora(student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    times = SamplerTimes((1.0, 0.5), first_chunk_times=(1.0, 0.75, 0.5))
    noise = torch.randn(2, times.num_noises, *LATENTS)
    expected = counted(lambda: rollout(student, torch.randn(2, 5, 10), noise, times))
    assert (
        forward_flops(rollout_passes(shape, LATENTS, batch=2, num_times=2, first_chunk_times=3, lora=lora)) == expected
    )


def test_discriminator_flops_and_parameters_equal_the_counted_ones() -> None:
    shape = DiscriminatorShape(
        in_channels=4, patch_size=(3, 2, 1), num_layers=2, num_heads=2, head_dim=6, ffn_dim=20, text_dim=10
    )
    model = LatentDiscriminator(shape)
    operations = discriminator_pass(shape, LATENTS, batch=3, text_len=5)
    latents, _, prompt = inputs(3)
    with torch.no_grad():
        assert forward_flops(operations) == counted(lambda: model(latents, prompt))
    expected = counted(lambda: model(latents, prompt).sum().backward())
    assert training_flops(operations, is_checkpointed=False) == expected
    assert count_discriminator(shape).total == sum(p.numel() for p in model.parameters())
    block, outside = discriminator_tensors(shape)
    assert sorted(block * shape.num_layers + outside) == sorted(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    latents.requires_grad_()
    slope = training_flops(slope_pass(operations), is_checkpointed=False)
    assert slope == counted(lambda: model(latents, prompt).sum().backward())


def test_backbone_discriminator_flops_and_parameters_equal_the_counted_ones() -> None:
    section = BackboneSection(layers=(0, 1), head_width=32, num_queries=3)
    model = BackboneDiscriminator(CausalStudent(backbone_shape(SHAPE, (0, 1))), (0, 1), section)
    frozen, heads = backbone_pass(SHAPE, section, LATENTS, batch=3)
    latents, _, prompt = inputs(3)
    with torch.no_grad():
        features, grid = model.features(latents, prompt)
        assert forward_flops(frozen) == counted(lambda: model.features(latents, prompt))
        assert forward_flops(heads) == counted(lambda: [h(x, grid) for h, x in zip(model.heads, features, strict=True)])
    expected = counted(lambda: model(latents, prompt).sum().backward())
    assert forward_flops(frozen) + training_flops(heads, is_checkpointed=False) == expected
    every = [size for part in backbone_tensors(SHAPE, section) for size in part]
    assert sorted(every) == sorted(p.numel() for p in model.parameters())
    count = count_backbone(SHAPE, section)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.requires_grad_(False)
    latents.requires_grad_()
    slope = training_flops(slope_pass([*frozen, *heads]), is_checkpointed=False)
    assert slope == counted(lambda: model(latents, prompt).sum().backward())


@pytest.mark.parametrize(("name", "total"), [("wan-1.3b", 1_418_996_800), ("wan-14b", 14_288_491_584)])
def test_the_published_sizes_are_met(name: str, total: int) -> None:
    shape = WAN_SHAPES[name]
    assert count_student(shape).total == total
    with torch.device("meta"):
        model: nn.Module = CausalStudent(shape)
    assert sum(p.numel() for p in model.parameters()) == total
