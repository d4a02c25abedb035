"""Heads on a frozen backbone: features are the student's own with full attention; only heads are trained."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from afd.config import BackboneSection, StudentShape
from afd.distributed import seeded_generator
from afd.models.backbone_discriminator import BackboneDiscriminator, backbone_shape
from afd.models.student import CausalStudent

SHAPE = StudentShape(
    in_channels=4, out_channels=4, patch_size=(1, 2, 2), num_layers=3, num_heads=2, head_dim=12, ffn_dim=16,
    freq_dim=8, text_dim=8, text_len=6, chunk_frames=2, window_frames=2,
)  # fmt: skip


def make_student(num_layers: int = 3) -> CausalStudent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = CausalStudent(SHAPE.model_copy(update={"num_layers": num_layers}))
        for parameter in student.parameters():
            nn.init.normal_(parameter, std=0.2)
    return student


def make_discriminator(layers: tuple[int, ...], *, is_trained: bool = True, **fields: object) -> BackboneDiscriminator:
    """A discriminator on the first blocks of `make_student`, heads random or as they start."""
    section = BackboneSection(layers=layers, head_width=32, num_queries=2, **fields)  # pyright: ignore
    student = CausalStudent(backbone_shape(SHAPE, layers))
    student.load_state_dict(
        {name: each for name, each in make_student().state_dict().items() if name in student.state_dict()}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        discriminator = BackboneDiscriminator(student, layers, section)
        if is_trained:
            for head in discriminator.heads:
                nn.init.normal_(head.get_parameter("score.weight"), std=0.3)
    return discriminator


def inputs(frames: int = 5) -> tuple[Tensor, Tensor]:
    """F = 5 is not a multiple of the student's chunk."""
    latents = torch.randn(3, 4, frames, 4, 6, generator=seeded_generator(1))
    return latents, torch.randn(3, 6, 8, generator=seeded_generator(2))


def test_features_are_those_of_the_student_with_one_chunk() -> None:
    discriminator = make_discriminator((0, 2), time=0.1)
    latents, prompt = inputs()
    features, grid = discriminator.features(latents, prompt)
    assert grid == (5, 2, 3)
    whole = make_student()
    whole.shape = SHAPE.model_copy(update={"chunk_frames": 5, "window_frames": 5})
    outputs: list[object] = []
    for index in (0, 2):
        whole.blocks[index].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        whole(latents, torch.full((3, 5), 0.1), prompt)
    torch.testing.assert_close(features, outputs, rtol=1e-5, atol=1e-6)  # float32


def test_frames_see_later_frames() -> None:
    discriminator = make_discriminator((0,))
    latents, prompt = inputs()
    changed = latents.clone()
    changed[:, :, -1] += 1
    first = [discriminator.features(each, prompt)[0][0][:, :6] for each in (latents, changed)]
    assert (first[0] - first[1]).abs().max() > 1e-4


def test_every_score_is_zero_before_the_first_update_and_follows_prompt_and_order_after() -> None:
    latents, prompt = inputs()
    assert torch.equal(make_discriminator((0, 2), is_trained=False)(latents, prompt), torch.zeros(3))
    discriminator = make_discriminator((0, 2))
    scores = discriminator(latents, prompt)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    for other in ((latents, prompt.flip(0)), (latents.flip(2), prompt)):
        assert (discriminator(*other) - scores).abs().max() > 1e-4


def test_only_heads_are_trained_and_the_frozen_pass_keeps_nothing() -> None:
    discriminator = make_discriminator((0, 2))
    trained = {name for name, each in discriminator.named_parameters() if each.requires_grad}
    assert trained == {name for name, _ in discriminator.named_parameters() if name.startswith("heads.")}
    latents, prompt = inputs()
    features, _ = discriminator.features(latents, prompt)
    assert not any(each.requires_grad for each in features)
    discriminator(latents, prompt).sum().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in discriminator.heads.parameters())
    assert all(each.grad is None for each in discriminator.backbone.parameters())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_reaches_the_clip_through_frozen_blocks(gradient_checkpointing: bool) -> None:
    discriminator = make_discriminator((0, 2), gradient_checkpointing=gradient_checkpointing).double()
    latents, prompt = (each.double() for each in inputs())
    latents.requires_grad_()
    direction = torch.randn(latents.shape, generator=seeded_generator(3), dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def total(clips: Tensor) -> Tensor:
        features, grid = discriminator.features(clips, prompt)
        heads = zip(discriminator.heads, features, strict=True)
        return (torch.stack([head(each, grid) for head, each in heads]).mean(dim=0) * weights).sum()

    (slope,) = torch.autograd.grad((discriminator(latents, prompt) * weights).sum(), latents)
    step = 1e-5
    with torch.no_grad():
        measured = (total(latents + step * direction) - total(latents - step * direction)) / (2 * step)
    assert measured.abs() > 1e-3
    # Scores are float32, their gradients with them; the finite difference is float64.
    assert (slope * direction).sum().item() == pytest.approx(measured.item(), rel=1e-5)


def test_scores_of_a_bfloat16_model_are_finer_than_bfloat16() -> None:
    discriminator = make_discriminator((0, 2))
    for head in discriminator.heads:
        nn.init.ones_(head.get_parameter("score.bias"))  # there bfloat16's steps are 2**-7
    latents, prompt = (each[:1] for each in inputs())
    noise = torch.randn(8, *latents.shape[1:], generator=seeded_generator(3))
    scores = discriminator.bfloat16()(latents + 0.1 * noise, prompt.expand(8, -1, -1))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert len(scores.unique()) == 8


def test_taps_are_the_ends_of_thirds_unless_written_down() -> None:
    assert [BackboneSection().taps(n) for n in (1, 2, 3, 4, 30)] == [
        (0,), (0, 1), (0, 1, 2), (0, 2, 3), (9, 19, 29),
    ]  # fmt: skip
    assert BackboneSection(layers=(1, 2)).taps(3) == (1, 2)
    with pytest.raises(
        ValueError, match=r"backbone.layers must be below 3, the student's number of blocks, got \[1, 3\]"
    ):
        BackboneSection(layers=(1, 3)).taps(3)
    for wrong in ((), (2, 1), (1, 1)):
        with pytest.raises(ValidationError, match="layers must be ascending block numbers"):
            BackboneSection(layers=wrong)


def test_wan_backbone_holds_no_more_than_the_tapped_blocks() -> None:
    wan = StudentShape(
        in_channels=16, out_channels=16, patch_size=(1, 2, 2), num_layers=30, num_heads=12, head_dim=128,
        ffn_dim=8960, freq_dim=256, text_len=512, text_dim=4096,
    )  # fmt: skip
    section = BackboneSection(layers=(9, 19))
    with torch.device("meta"):
        backbone = CausalStudent(backbone_shape(wan, (9, 19)))
        discriminator = BackboneDiscriminator(backbone, (9, 19), section)
        whole = sum(each.numel() for each in CausalStudent(wan).parameters())
        scores = discriminator(torch.empty(2, 16, 3, 8, 8), torch.empty(2, 512, 4096))
    frozen = sum(each.numel() for each in discriminator.backbone.parameters())
    trained = sum(each.numel() for each in discriminator.parameters() if each.requires_grad)
    assert scores.shape == (2,)
    assert 0.6 < frozen / whole < 0.7, "20 of 30 blocks"
    assert trained < 0.01 * frozen
