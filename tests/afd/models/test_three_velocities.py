"""Other roles' velocities beside the trained one: the same as in passes of their own, and no gradient for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from afd.config import LoRASection
from afd.models.lora import acting_as, add_lora, add_old_adapter, has_old_adapter, is_old_adapter, old_adapter_name
from afd.models.student import CausalStudent
from afd.models.three_velocities import LaggingPass

MakeStudent = Callable[..., CausalStudent]
TARGETS = LoRASection().targets


def adapted(make_student: MakeStudent, **shape: int) -> CausalStudent:
    """A float64 student whose two adapters differ from each other and from zero."""
    student = make_student(dtype=torch.float64, chunk_frames=1, **shape)
    add_lora(student, rank=3, alpha=6, targets=TARGETS)
    add_old_adapter(student, rank=3, alpha=6, targets=TARGETS)
    student.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return student


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy, clean = (torch.randn(2, 4, 3, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t, prompt = (torch.rand(2, size, generator=generator, dtype=torch.float64) for size in (3, 30))
    return noisy, t, prompt.view(2, 5, 6), clean


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_roles_beside_each_other_equal_passes_of_their_own(make_student: MakeStudent, is_checkpointed: bool) -> None:
    student = adapted(make_student)
    student.gradient_checkpointing = is_checkpointed
    noisy, t, prompt, clean = inputs()
    alone = {}
    for role in ("old", "reference"):
        with acting_as(role, student):
            alone[role] = student(noisy, t, prompt, clean=clean)
    v = student(noisy, t, prompt, clean=clean)
    v.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    lagging = LaggingPass(["old", "reference"])
    beside = student(noisy, t, prompt, clean=clean, lagging=lagging)
    beside.square().sum().backward()
    torch.testing.assert_close(beside, v, rtol=0, atol=1e-12)
    assert (alone["old"] - v).abs().max() > 0.1
    for role, expected in alone.items():
        assert (alone[role] - alone["old"]).abs().max() > 0.1 or role == "old"
        torch.testing.assert_close(lagging.velocities[role], expected, rtol=0, atol=1e-12)
        assert not lagging.velocities[role].requires_grad
    assert set(gradients) == {name for name, p in student.named_parameters() if p.requires_grad}
    for name, parameter in student.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-11, msg=name)
        else:
            assert parameter.grad is None, name


def test_the_reference_is_the_base_without_adapters(make_student: MakeStudent) -> None:
    base = make_student(dtype=torch.float64, chunk_frames=1)
    noisy, t, prompt, clean = inputs()
    lagging = LaggingPass(["reference"])
    with torch.no_grad():
        adapted(make_student)(noisy, t, prompt, clean=clean, lagging=lagging)
        torch.testing.assert_close(lagging.velocities["reference"], base(noisy, t, prompt, clean=clean), rtol=0, atol=0)


def test_the_old_adapter_starts_as_a_frozen_copy(make_student: MakeStudent) -> None:
    student = make_student(chunk_frames=1)
    add_lora(student, rank=3, alpha=6, targets=TARGETS)
    assert not has_old_adapter(student)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    add_old_adapter(student, rank=3, alpha=6, targets=TARGETS)
    assert has_old_adapter(student)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    weights = student.state_dict()
    assert {old_adapter_name(name) for name in trained} == {name for name in weights if is_old_adapter(name)}
    assert all(torch.equal(weights[name], weights[old_adapter_name(name)]) for name in trained)


def test_the_trained_adapter_is_back_after_an_error(make_student: MakeStudent) -> None:
    student = adapted(make_student)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    noisy, t, prompt, clean = inputs()
    before = student(noisy, t, prompt, clean=clean)
    with pytest.raises(KeyError), acting_as("old", student):
        raise KeyError("inside")
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    assert torch.equal(student(noisy, t, prompt, clean=clean), before)


def test_roles_cannot_share_what_is_not_adapted_or_lies_outside_the_blocks(make_student: MakeStudent) -> None:
    with pytest.raises(ValueError, match=r"needs a student with adapters, got none: set student\.lora\.rank"):
        add_old_adapter(make_student(), rank=2, alpha=2, targets=["to_q"])
    student = make_student()
    add_lora(student, rank=2, alpha=2, targets=["to_q", "proj_out"])
    with pytest.raises(ValueError, match=r"must lie inside the blocks for nft\.velocities = one_gather, got proj_out"):
        add_old_adapter(student, rank=2, alpha=2, targets=["to_q", "proj_out"])
