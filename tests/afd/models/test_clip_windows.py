"""Windows of a long video: where they lie, and that scores and gradients are the mean over single windows."""

import pytest
import torch
from torch import Tensor, nn

from afd.config import DiscriminatorShape
from afd.distributed import seeded_generator
from afd.models.clip_windows import ClipWindows, draw_windows, even_starts, random_starts
from afd.models.discriminator import LatentDiscriminator

SHAPE = DiscriminatorShape(in_channels=2, patch_size=(1, 1, 1), num_layers=1, num_heads=2, head_dim=12, ffn_dim=16)


@pytest.fixture(scope="module")
def scorer() -> LatentDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LatentDiscriminator(SHAPE)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.double()


def inputs(frames: int) -> tuple[Tensor, Tensor]:
    latents = torch.randn(3, 2, frames, 2, 3, generator=seeded_generator(1), dtype=torch.float64)
    return latents, torch.randn(3, 4, 32, generator=seeded_generator(2), dtype=torch.float64)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((7, 3, 1), [2]), ((7, 3, 2), [0, 4]), ((7, 3, 3), [0, 2, 4]), ((5, 5, 1), [0]), ((21, 6, 4), [0, 5, 10, 15])],
)
def test_even_windows_reach_from_start_to_end(sizes: tuple[int, int, int], expected: list[int]) -> None:
    assert even_starts(*sizes) == expected


def test_random_windows_are_in_the_video_and_every_place_is_as_likely() -> None:
    starts = random_starts(9, 3, 2, [seeded_generator(row) for row in range(4000)])
    assert starts.shape == (4000, 2)
    counts = torch.bincount(starts.flatten(), minlength=7)
    assert len(counts) == 7
    assert (counts / 8000 - 1 / 7).abs().max() < 0.015, "six standard errors of a share of 1/7"
    assert bool((starts[:, 1] >= starts[:, 0]).all())
    every = random_starts(9, 3, 7, [seeded_generator(0)])
    assert every.tolist() == [list(range(7))], "as many windows as places: each once"


def test_rows_draw_their_own_windows_whatever_the_batch() -> None:
    together = random_starts(30, 4, 3, [seeded_generator(row) for row in range(5)])
    alone = torch.cat([random_starts(30, 4, 3, [seeded_generator(row)]) for row in range(5)])
    assert torch.equal(together, alone)
    assert len({tuple(row) for row in together.tolist()}) == 5


@pytest.mark.parametrize("is_random", [False, True])
def test_score_and_gradient_are_the_mean_over_single_windows(scorer: LatentDiscriminator, is_random: bool) -> None:
    model = ClipWindows(scorer, clip_frames=3, num_clips=2)
    latents, prompt = inputs(8)
    starts = model.draw_starts(8, [seeded_generator(7, row) for row in range(3)])
    assert starts is not None
    places = starts.tolist() if is_random else [even_starts(8, 3, 2)] * 3
    latents.requires_grad_()
    scores = model(latents, prompt, starts) if is_random else model(latents, prompt)
    alone = latents.detach().clone().requires_grad_()
    expected = torch.stack(
        [
            torch.stack([scorer(alone[row : row + 1, :, s : s + 3], prompt[row : row + 1])[0] for s in places[row]])
            for row in range(3)
        ]
    ).mean(dim=1)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)  # scores are float32
    weights = torch.tensor([1.0, -2.0, 0.5])
    (gradient,) = torch.autograd.grad((scores * weights).sum(), latents)
    (by_hand,) = torch.autograd.grad((expected * weights).sum(), alone)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-6, atol=1e-8)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("clip_frames", [5, 9])
def test_one_window_that_covers_all_is_the_plain_score(scorer: LatentDiscriminator, clip_frames: int) -> None:
    model = ClipWindows(scorer, clip_frames=clip_frames, num_clips=1)
    latents, prompt = inputs(5)
    assert torch.equal(model(latents, prompt), scorer(latents, prompt))
    assert draw_windows(model, latents, [seeded_generator(0)] * 3) == ()


def test_a_plain_discriminator_draws_no_windows(scorer: LatentDiscriminator) -> None:
    generator = seeded_generator(3)
    before = generator.get_state()
    assert draw_windows(scorer, torch.zeros(1, 2, 9, 2, 2), [generator]) == ()
    assert torch.equal(generator.get_state(), before)
