"""Low-rank adapters on the student, through peft; the base weights are frozen and shared by all roles.

The student being trained is base + adapter `default`. The old policy can live beside it as a second, frozen adapter;
the reference is the base alone. Which role a forward computes is switched per block (`acting_as`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CURRENT, OLD = "default", "old"  # names of adapters; the reference has none
ADAPTER_OF_ROLE = {"current": (CURRENT,), "old": (OLD,), "reference": ()}


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


def add_old_adapter(student: nn.Module, *, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Add the old policy's adapter beside the trained one in place: frozen, and equal to it.

    Args:
        student: with the adapters of `add_lora`.
        rank, alpha, targets: as given there.
    Raises:
        ValueError: the student has no adapters, or some outside its blocks, which all roles run through together.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = {name: each for name, each in student.named_modules() if _is_adapted(each)}
    if not layers:
        raise ValueError("the old policy's adapter needs a student with adapters, got none: set student.lora.rank")
    for name in layers:
        if not name.startswith("blocks."):
            raise ValueError(
                f"student.lora.targets must lie inside the blocks for nft.velocities = one_gather, got {name}"
            )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # it is the point
        inject_adapter_in_model(config, student, adapter_name=OLD)
    for layer in _adapted_layers(student):
        for side in (layer.lora_A, layer.lora_B):
            side[OLD].load_state_dict(side[CURRENT].state_dict())
        layer.set_adapter(CURRENT)


def old_adapter_name(name: str) -> str:
    """The old policy's twin of a parameter of the trained adapter."""
    return name.replace(f".lora_A.{CURRENT}.", f".lora_A.{OLD}.").replace(f".lora_B.{CURRENT}.", f".lora_B.{OLD}.")


def is_old_adapter(name: str) -> bool:
    """True for parameters that only mirror the old policy's average: nothing that a checkpoint or an export needs."""
    return f".lora_A.{OLD}." in name or f".lora_B.{OLD}." in name


def has_old_adapter(student: nn.Module) -> bool:
    """Whether the old policy lives beside the trained adapter."""
    return any(is_old_adapter(name) for name, _ in student.named_parameters())


@contextmanager
def acting_as(role: str, module: nn.Module) -> Iterator[None]:
    """Run a module without gradient as the old policy or the reference; it is the current student afterwards.

    peft switches by freezing every adapter but the active one, hence no gradient inside and the trained one back after.
    """
    layers = _adapted_layers(module)
    for layer in layers:
        layer.set_adapter(list(ADAPTER_OF_ROLE[role]), inference_mode=True)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.set_adapter(CURRENT)


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """W [out, in] + scale B [out, r] A [r, in], in at least float32, rounded to `dtype`, by default W's."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (up.to(wide) @ down.to(wide))).to(dtype or weight.dtype)


@contextmanager
def merged_adapters(
    student: nn.Module, *, is_disposable: Callable[[nn.Parameter], bool] = lambda parameter: False
) -> Iterator[None]:
    """Run with the trained adapter merged into the base: one product per layer instead of three, no gradient.

    Nothing is subtracted afterwards: what the base was is put back as it was. The whole weights must stay alive and be
    left alone inside. In bf16 the merged weight is rounded, and an update below half its unit in the last place is
    lost: whether that is the same policy is the caller's question.

    Args:
        student: with or without adapters, parameters whole.
        is_disposable: whether a base weight's memory is a copy that nobody will read afterwards: then it is written
            over, otherwise the merged weight takes memory of its own.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    layers = _adapted_layers(student)
    try:
        with torch.no_grad():
            for layer in layers:
                base = layer.get_base_layer().weight
                adapter = layer.lora_A[CURRENT].weight, layer.lora_B[CURRENT].weight
                whole = merge(base.data, *adapter, layer.scaling[CURRENT])
                if is_disposable(base):
                    base.data.copy_(whole)
                else:
                    kept.append((base, base.data))
                    base.data = whole
                layer.merged_adapters.append(CURRENT)  # peft's mark: the base alone computes
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for base, before in kept:
            base.data = before


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _adapted_layers(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if _is_adapted(each)]


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
