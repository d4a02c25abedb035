"""The rollout repeated in the teacher-forcing layout, and what a student minimises against D."""

import dataclasses

import pytest
import torch

from afd.config import DiscriminatorSection, StudentShape
from afd.distributed import seeded_generator
from afd.models.student import CausalStudent
from afd.rollout import SamplerTimes, rollout
from afd.train.gan_objective import frozen, generator_loss, last_step_in_parallel, truncated


@pytest.mark.parametrize("context_noise", [0.0, 0.1])
@pytest.mark.parametrize(("num_steps", "first"), [(1, None), (3, None), (1, (1.0, 0.8, 0.3)), (3, (1.0, 0.6))])
def test_repeated_rollout_is_the_rollout_with_the_last_steps_gradient(
    num_steps: int, first: tuple[float, ...] | None, context_noise: float
) -> None:
    shape = StudentShape(num_layers=2, num_heads=2, head_dim=12, ffn_dim=16, freq_dim=8, chunk_frames=2)
    torch.manual_seed(0)
    student = CausalStudent(shape).double()
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    times = SamplerTimes((1.0, 0.7, 0.4)[:num_steps], first, context_noise=context_noise)
    noise = torch.randn(2, times.num_noises, 12, 6, 4, 4, dtype=torch.float64)
    prompt = torch.randn(2, 5, 32, dtype=torch.float64)
    made = rollout(student, prompt, noise, times)
    again = last_step_in_parallel(student, made, prompt, noise, times, shape)
    assert (again - made).abs().max() < 1e-10  # float64
    again.square().sum().backward()
    assert student.patch_embedding.weight.grad is not None


def test_truncation_is_uniform_and_keeps_the_first_steps() -> None:
    times = SamplerTimes((1.0, 0.8, 0.5), context_noise=0.1)
    cut = [truncated(times, (0, step)) for step in range(300)]
    assert all(each == dataclasses.replace(times, times=times.times[: len(each.times)]) for each in cut)
    counts = [sum(len(each.times) == length for each in cut) for length in (1, 2, 3)]
    assert min(counts) > 70
    both = [truncated(dataclasses.replace(times, first_chunk_times=(1.0, 0.6)), (0, step)) for step in range(300)]
    assert {(len(each.times), len(each.first_chunk_times or ())) for each in both} == {
        (count, first) for count in (1, 2, 3) for first in (1, 2)
    }


def test_generator_losses_are_the_discriminators_with_roles_swapped() -> None:
    teacher, student = (torch.randn(6, generator=seeded_generator(i), dtype=torch.float64) for i in (0, 1))
    preferred = generator_loss(teacher, student, DiscriminatorSection(temperature=2.0))
    assert preferred.item() == pytest.approx(torch.nn.functional.softplus((teacher - student) / 2).mean().item())
    taken_for_real = generator_loss(teacher, student, DiscriminatorSection(loss="gan"))
    assert taken_for_real.item() == pytest.approx(torch.nn.functional.softplus(-student).mean().item())


def test_frozen_module_gets_its_gradients_back() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with frozen(module):
        assert not module.weight.requires_grad
    assert module.weight.requires_grad
    assert not module.bias.requires_grad
