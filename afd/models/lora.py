"""Low-rank adapters on the student, through peft; the base weights are frozen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def add_lora(student: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
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
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), student)
