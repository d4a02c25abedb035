"""The discriminator's and the generator's losses: by hand, gradients, and the density ratio that is the optimum."""

import math

import pytest
import torch
from torch import Tensor, nn

from afd.diffusion.losses import bradley_terry_loss, gan_discriminator_loss, non_saturating_loss


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


# Each Gaussian by prompt: mean [P, d] and covariance [P, d, d] of the teacher's x and the student's.
TEACHER = (
    torch.tensor([[0.5, 0.2], [-0.8, 0.4]], dtype=torch.float64),
    torch.tensor([[[1.0, 0.4], [0.4, 0.8]], [[0.6, -0.2], [-0.2, 0.9]]], dtype=torch.float64),
)
STUDENT = (
    torch.tensor([[-0.5, 0.0], [0.0, -0.3]], dtype=torch.float64),
    torch.tensor([[[1.4, 0.0], [0.0, 1.1]], [[0.8, 0.2], [0.2, 0.7]]], dtype=torch.float64),
)


def _gaussians(law: tuple[Tensor, Tensor], size: int) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(law[0][:, :size], law[1][:, :size, :size])


@pytest.mark.parametrize("loss", ["bradley_terry", "gan"])
@pytest.mark.parametrize("size", [1, 2])
def test_optimum_is_the_log_density_ratio_per_prompt(size: int, loss: str) -> None:
    """Two prompts, Gaussian "videos": a quadratic in x per prompt, which holds the truth, trained to the optimum."""
    temperature = 2.0 if loss == "bradley_terry" else 1.0
    laws = _gaussians(TEACHER, size), _gaussians(STUDENT, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = [law.sample((20_000,)) for law in laws]  # [n, 2 prompts, size]
    coefficients = torch.zeros(2, 1 + size + size * size, dtype=torch.float64, requires_grad=True)

    def scores(x: Tensor) -> Tensor:
        squares = (x[..., :, None] * x[..., None, :]).flatten(2)
        return torch.einsum("npf,pf->np", torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1), coefficients)

    optimizer = torch.optim.LBFGS([coefficients], max_iter=60, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        teacher, student = (scores(x).flatten() for x in pair)
        value = (
            gan_discriminator_loss(teacher, student)
            if loss == "gan"
            else bradley_terry_loss(teacher, student, temperature=temperature)
        )
        value.backward()
        return value

    optimizer.step(objective)
    x = torch.cat(pair)  # where the two have their mass
    with torch.no_grad():
        found = scores(x) / temperature
    truth = laws[0].log_prob(x) - laws[1].log_prob(x)
    error = found - truth
    if loss == "bradley_terry":
        error = error - error.mean(0)
    assert (error.std(0) < 0.05 * truth.std(0)).all(), f"{error.std(0).tolist()} of {truth.std(0).tolist()}"
    assert (error.mean(0).abs() < 0.05 * truth.std(0)).all()


def test_gan_losses_by_hand() -> None:
    teacher, student = torch.tensor([1.0, -0.5]), torch.tensor([0.3, -2.0])
    real = [0.9 * math.log1p(math.exp(-s)) + 0.1 * math.log1p(math.exp(s)) for s in teacher.tolist()]
    fake = [math.log1p(math.exp(s)) for s in student.tolist()]
    loss = gan_discriminator_loss(teacher, student, label_smoothing=0.1)
    assert loss.item() == pytest.approx(sum(real) / 2 + sum(fake) / 2, rel=1e-6)
    generator = sum(math.log1p(math.exp(-s)) for s in student.tolist()) / 2
    assert non_saturating_loss(student).item() == pytest.approx(generator, rel=1e-6)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        gan_discriminator_loss(teacher, student, label_smoothing=0.5)
