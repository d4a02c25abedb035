"""The latent discriminator sees the whole clip and the prompt."""

import pytest
import torch

from afd.config import DiscriminatorShape
from afd.models.discriminator import LatentDiscriminator

SHAPE = DiscriminatorShape(
    in_channels=3, patch_size=(2, 1, 3), num_layers=2, num_heads=2, head_dim=8, ffn_dim=20, text_dim=6
)
CLIP = (2, 3, 6, 2, 9)


def inputs(*, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips with prompts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(CLIP, generator=generator, dtype=dtype), torch.randn(2, 4, 6, generator=generator, dtype=dtype)


@pytest.fixture
def discriminator() -> LatentDiscriminator:
    """A tiny discriminator, its head still zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LatentDiscriminator(SHAPE)


@pytest.fixture
def trained(discriminator: LatentDiscriminator) -> LatentDiscriminator:
    """The same with a random head: scores differ."""
    torch.nn.init.normal_(discriminator.head.weight, generator=torch.Generator().manual_seed(1))
    return discriminator


def test_every_score_is_zero_before_the_first_update(discriminator: LatentDiscriminator) -> None:
    scores = discriminator(*inputs())
    assert scores.tolist() == [0, 0]
    assert scores.dtype == torch.float32


def test_the_head_learns_from_the_zero_start(discriminator: LatentDiscriminator) -> None:
    discriminator(*inputs())[0].backward()
    assert discriminator.head.weight.grad is not None
    assert discriminator.head.weight.grad.abs().sum() > 0


def test_every_frame_and_the_prompt_matter(trained: LatentDiscriminator) -> None:
    latents, prompt = (tensor.requires_grad_() for tensor in inputs())
    scores = trained(latents, prompt)
    assert scores.shape == (2,)
    assert scores[0] != scores[1]
    scores[0].backward()
    assert latents.grad is not None
    assert prompt.grad is not None
    assert (latents.grad[0].abs().sum((0, 2, 3)) > 0).all()  # [F]
    assert (prompt.grad[0].abs().sum(1) > 0).all()  # [L]
    assert not latents.grad[1].any(), "clips must not see each other"


def test_frames_see_later_frames(trained: LatentDiscriminator) -> None:
    latents, prompt = inputs()
    seen = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        seen.append(output.detach())

    trained.blocks[0].register_forward_hook(keep)
    trained(latents, prompt)
    latents[:, :, -2:] += 1
    trained(latents, prompt)
    first_token = (seen[1] - seen[0])[:, 0]
    assert (first_token.abs().sum(1) > 0).all()


def test_the_order_of_frames_matters(trained: LatentDiscriminator) -> None:
    latents, prompt = inputs()
    assert not torch.allclose(trained(latents, prompt), trained(latents.flip(2), prompt), atol=1e-4)


def test_every_parameter_gets_a_gradient(trained: LatentDiscriminator) -> None:
    trained(*inputs()).square().sum().backward()
    silent = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_a_float64_model_returns_float32_scores(trained: LatentDiscriminator) -> None:
    single = trained(*(tensor.float() for tensor in inputs(dtype=torch.float64)))
    scores = trained.double()(*inputs(dtype=torch.float64))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, single, rtol=0, atol=1e-5)


def test_scores_of_a_bfloat16_model_are_finer_than_bfloat16(trained: LatentDiscriminator) -> None:
    trained.head.bias.data.fill_(1.0)  # where bfloat16's steps are 2**-7, rollouts of one prompt fall together
    clip, prompt = (tensor[:1] for tensor in inputs())
    noise = torch.randn(8, *clip.shape[1:], generator=torch.Generator().manual_seed(2))
    scores = trained.bfloat16()(clip + 0.1 * noise, prompt.expand(8, -1, -1))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert len(scores.unique()) == 8


@pytest.mark.parametrize("shape", [(2, 3, 6, 2), (2, 4, 6, 2, 9), (2, 3, 5, 2, 9), (2, 3, 6, 2, 8)])
def test_wrong_latents_are_named(discriminator: LatentDiscriminator, shape: tuple[int, ...]) -> None:
    message = r"latents must be \[N, 3, F, H, W\] with F, H, W divisible by \[2, 1, 3\], got \["
    with pytest.raises(ValueError, match=message):
        discriminator(torch.zeros(shape), torch.zeros(2, 4, 6))
