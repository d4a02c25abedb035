"""Low-rank adapters on the student, through peft; the base weights are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def add_lora(student: nn.Module, *, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Freeze a student and add adapters to its linear layers in place; B starts at zero, so nothing changes yet.

    Args:
        student: a `CausalStudent`.
        rank: r > 0.
        alpha: the update is alpha / r times B A.
        targets: suffixes of the layers' names.
    Raises:
        ValueError: a target matches no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"student.lora.targets: {target!r} matches no linear layer of the student")
    student.requires_grad_(False)
    # ZeRO-3 drops a block's weights when its input's gradient arrives, and reentrant checkpointing needs an input with
    # a gradient: with a frozen embedding in front, the first block would have none.
    student.get_submodule("patch_embedding").register_forward_hook(_require_gradient)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), student)


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
