"""What autograd keeps, storage by storage, equals the planner's list."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd.config import LoRASection, StudentShape
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.planning.activations import PassShape, block_saved_bytes, saved_bytes

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
