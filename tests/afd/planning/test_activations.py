"""What autograd keeps, storage by storage, equals the planner's list."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd.config import BackboneSection, DiscriminatorShape, LoRASection, StudentShape
from afd.models.backbone_discriminator import BackboneDiscriminator, backbone_shape
from afd.models.discriminator import LatentDiscriminator
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.planning.activations import (
    PassShape,
    backbone_slope_bytes,
    block_saved_bytes,
    discriminator_slope_bytes,
    saved_bytes,
)

SHAPE = StudentShape(
    in_channels=4, out_channels=4, patch_size=(1, 2, 2), num_layers=2, num_heads=2, head_dim=12, ffn_dim=56,
    freq_dim=16, text_len=5, text_dim=10, chunk_frames=2,
)  # fmt: skip
LATENTS = (4, 6, 4, 6)


def kept_bytes(model: nn.Module, run: Any) -> int:
    """Bytes of distinct storages that the forward saves, parameters excluded."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"window_frames": 4, "sink_frames": 1, "cross_attn_norm": False}, {"num_layers": 3, "chunk_frames": 3}],
)
def test_a_full_forward_keeps_what_the_list_says(changes: dict[str, Any], batch: int) -> None:
    shape = SHAPE.model_copy(update=changes)
    student = CausalStudent(shape)
    noisy, clean = torch.randn(2, batch, *LATENTS)
    t, prompt = torch.rand(batch, LATENTS[1]), torch.randn(batch, 5, 10)
    kept = kept_bytes(student, lambda: student(noisy, t, prompt, clean=clean))
    # One storage holds both clips here, and is saved as one.
    one = PassShape(shape, LATENTS, batch, width=4, kernels="eager")
    assert kept == saved_bytes(one, is_checkpointed=False)


def test_a_forward_of_noised_clips_alone_keeps_what_the_list_says() -> None:
    student = CausalStudent(SHAPE)
    noisy, t, prompt = torch.randn(3, *LATENTS), torch.rand(3, LATENTS[1]), torch.randn(3, 5, 10)
    one = PassShape(SHAPE, LATENTS, 3, width=4, kernels="eager", teacher_forcing=False)
    assert kept_bytes(student, lambda: student(noisy, t, prompt)) == saved_bytes(one, is_checkpointed=False)


def test_frozen_discriminators_keep_what_the_gradient_at_the_clips_needs() -> None:
    latents, prompt = torch.randn(3, *LATENTS, requires_grad=True), torch.randn(3, 5, 10)
    shape = DiscriminatorShape(
        in_channels=4, patch_size=(3, 2, 1), num_layers=3, num_heads=2, head_dim=6, ffn_dim=20, text_dim=10
    )
    latent: nn.Module = LatentDiscriminator(shape).requires_grad_(False)
    planned = discriminator_slope_bytes(shape, LATENTS, batch=3, text_len=5, width=4)
    assert kept_bytes(latent, lambda: latent(latents, prompt)) == pytest.approx(planned, rel=0.02)
    kept, listed = [], []
    for is_checkpointed in (False, True):
        section = BackboneSection(layers=(0, 2), head_width=32, num_queries=3, gradient_checkpointing=is_checkpointed)
        deep = SHAPE.model_copy(update={"num_layers": 3})
        backbone: nn.Module = BackboneDiscriminator(CausalStudent(backbone_shape(deep, (0, 2))), (0, 2), section)
        backbone.requires_grad_(False)
        listed.append(backbone_slope_bytes(deep, section, LATENTS, batch=3, width=4))
        kept.append(kept_bytes(backbone, lambda model=backbone: model(latents, prompt)))
    assert kept[0] == pytest.approx(listed[0], rel=0.02)
    assert kept[1] < listed[1] < listed[0], "with recomputation one block on its way back comes on top"


def test_frozen_weights_keep_less() -> None:
    student = CausalStudent(SHAPE)
    add_lora(student, rank=2, alpha=2, targets=LoRASection().targets)
    noisy, clean = torch.randn(2, 3, *LATENTS)
    t, prompt = torch.rand(3, LATENTS[1]), torch.randn(3, 5, 10)
    kept = kept_bytes(student, lambda: student(noisy, t, prompt, clean=clean))
    one = PassShape(SHAPE, LATENTS, 3, width=4, kernels="eager", is_adapted=True, lora_rank=2)
    assert kept == pytest.approx(saved_bytes(one, is_checkpointed=False), rel=0.02)


def test_attention_that_copies_keys_is_the_price_of_the_chunk_loop() -> None:
    wan = StudentShape(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960, patch_size=(1, 2, 2))
    ones = [
        PassShape(wan, (12, 21, 60, 104), 1, width=2, kernels="fused", copies_keys=copies) for copies in (True, False)
    ]
    copying, reading = (block_saved_bytes(one) for one in ones)
    # Noisy chunks 2 to 7 see 2 to 7 chunks of 4680 tokens; keys and values, 2 bytes each.
    assert copying - reading == 2 * (2 + 3 + 4 + 5 + 6 + 7) * 4680 * 1536 * 2
