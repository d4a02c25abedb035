"""The Bradley-Terry loss: by hand, its gradient, and the density ratio that is its optimum."""

import math

import pytest
import torch
from torch import Tensor, nn

from afd.diffusion.losses import bradley_terry_loss


def test_value_by_hand() -> None:
    teacher, student = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 0.5])
    expected = (math.log1p(math.exp(-2 / 0.5)) + math.log1p(math.exp(1.5 / 0.5))) / 2
    loss = bradley_terry_loss(teacher, student, temperature=0.5)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_at_equal_scores() -> None:
    teacher, student = (torch.full((4,), 3.0, requires_grad=True) for _ in range(2))
    loss = bradley_terry_loss(teacher, student, temperature=2.0, label_smoothing=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    # d/dm of -(1 - s) log sigmoid(m) - s log sigmoid(-m) at m = 0 is s - 1/2; m = difference / temperature; mean of 4.
    slope = (0.1 - 0.5) / 2.0 / 4
    assert teacher.grad is not None
    assert student.grad is not None
    assert teacher.grad.tolist() == pytest.approx([slope] * 4)
    assert student.grad.tolist() == pytest.approx([-slope] * 4)


def test_gradcheck_with_every_knob() -> None:
    teacher, student = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry_loss(a, b, temperature=0.7, label_smoothing=0.2), (teacher, student)
    )


@pytest.mark.parametrize("smoothing", [0.05, 0.2, 0.4])
def test_smoothing_is_the_cross_entropy_to_one_minus_s(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    margin = teacher - student
    expected = nn.functional.binary_cross_entropy_with_logits(margin, torch.full_like(margin, 1 - smoothing))
    loss = bradley_terry_loss(teacher, student, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    best = torch.tensor([math.log((1 - smoothing) / smoothing)], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(best, torch.zeros_like(best), label_smoothing=smoothing).backward()
    assert best.grad is not None
    assert best.grad.abs().item() < 1e-12


def test_huge_margins_stay_finite() -> None:
    loss = bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * 2e4)


def test_shapes_must_pair_up() -> None:
    with pytest.raises(ValueError, match=r"teacher_scores must be \[3\] like student_scores, got \[2\]"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(("temperature", "smoothing"), [(0.0, 0.0), (-1.0, 0.0), (1.0, 0.5), (1.0, -0.1)])
def test_knobs_must_be_in_range(temperature: float, smoothing: float) -> None:
    with pytest.raises(ValueError, match="temperature must be > 0 and label_smoothing in"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), temperature=temperature, label_smoothing=smoothing)


TEACHER = torch.tensor([[0.5, 1.0], [-0.8, 0.8]], dtype=torch.float64)  # mean, std of the teacher's x, by prompt
STUDENT = torch.tensor([[-0.5, 1.2], [0.0, 0.9]], dtype=torch.float64)


def _log_density(x: Tensor, law: Tensor) -> Tensor:
    return -0.5 * ((x - law[:, :1]) / law[:, 1:]).square() - law[:, 1:].log()


def test_optimum_is_the_log_density_ratio_up_to_a_constant_per_prompt() -> None:
    """Two prompts, one-dimensional Gaussian "videos": an MLP trained with the loss finds log p_T / p_S."""
    temperature = 2.0
    generator = torch.Generator().manual_seed(0)
    prompts = torch.eye(2, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def scores(x: Tensor) -> Tensor:  # x [2 prompts, n] -> [2, n]
        words = prompts[:, None].expand(-1, x.shape[1], -1)
        return network(torch.cat([x[..., None], words], dim=-1)).squeeze(-1)

    def draw(law: Tensor, count: int) -> Tensor:
        return law[:, :1] + law[:, 1:] * torch.randn(2, count, generator=generator, dtype=torch.float64)

    num_steps = 400
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        teacher, student = scores(draw(TEACHER, 512)), scores(draw(STUDENT, 512))
        optimizer.zero_grad()
        bradley_terry_loss(teacher.flatten(), student.flatten(), temperature=temperature).backward()
        optimizer.step()
        schedule.step()
    x = torch.linspace(-4, 4, 201, dtype=torch.float64).expand(2, -1)
    log_teacher, log_student = _log_density(x, TEACHER), _log_density(x, STUDENT)
    weight = log_teacher.exp() + log_student.exp()
    weight = weight / weight.sum(1, keepdim=True)
    with torch.no_grad():
        error = scores(x) / temperature - (log_teacher - log_student)
    error = error - (weight * error).sum(1, keepdim=True)
    truth = (log_teacher - log_student) - (weight * (log_teacher - log_student)).sum(1, keepdim=True)
    rms_error, rms_truth = ((weight * value.square()).sum(1).sqrt() for value in (error, truth))
    assert (rms_error < 0.1 * rms_truth).all(), f"rms error {rms_error.tolist()} of {rms_truth.tolist()}"
