"""LoRA adapters in a weight source: found by name, merged tensor by tensor as they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from afd.models.lora import merge
from afd.models.weights.sources import LazyTensor, WeightSource

_ADAPTER = re.compile(r"^(?P<layer>.+)\.lora_(?P<part>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight$")
_BASE = ".base_layer."
OWN_ADAPTER = "default"


def split_adapters(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """(base, adapters): base names without peft's `base_layer`; adapters as `<layer>.lora_A`, `.lora_B`, `.alpha`.

    Of several adapters (a run's lagging copies) the one called default is taken.

    Raises:
        ValueError: several adapters and none is called default.
    """
    matches = {name: match for name in tensors if (match := _ADAPTER.match(name))}
    named = {match["adapter"] for match in matches.values()} - {None}
    if len(named) > 1 and OWN_ADAPTER not in named:
        raise ValueError(f"weights hold several adapters, expected one or one called default, got {sorted(named)}")
    base: dict[str, LazyTensor] = {}
    adapters: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = matches.get(name)
        if match is None:
            is_alpha = name.endswith(".alpha") and not tensor.shape
            (adapters if is_alpha else base)[name.replace(_BASE, ".")] = tensor
        elif len(named) < 2 or match["adapter"] == OWN_ADAPTER:
            part = "A" if match["part"] in ("A", "down") else "B"
            adapters[f"{match['layer']}.lora_{part}"] = tensor
    return base, adapters


def merge_adapters(
    source: WeightSource,
    base: WeightSource | None = None,
    *,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
) -> WeightSource:
    """The source with its adapters merged: W + alpha / r B A, in float32, rounded once.

    Args:
        source: with or without adapters; without, it is returned as it is (peft's names undone).
        base: the weights under adapters that come without them.
        alpha: when neither the file nor its adapters' `.alpha` tensors say.
        dtype: of the merged layers; None rounds to W's, and in bf16 the smallest updates away.
    Raises:
        ValueError: adapters without base, without alpha, or that do not fit.
    """
    own, adapters = split_adapters(source.tensors)
    if not adapters:
        return WeightSource(source.label, own, source.facts, source.lora_alpha)
    layers = sorted({name.rsplit(".", 1)[0] for name in adapters})
    if base is not None:
        if own:
            raise ValueError(f"{source.label} hold a base beside their adapters: leave out init_base")
        own, nested = split_adapters(base.tensors)
        if nested:
            raise ValueError(f"init_base: {base.label} hold adapters themselves; convert them first (afd convert)")
    if not own:
        raise ValueError(
            f"{source.label} hold LoRA adapters without their base ({len(layers)} layers, {layers[0]} first): name the "
            "base weights in student.init_base"
        )
    merged = dict(own)
    for layer in layers:
        merged[f"{layer}.weight"] = _merged(source, own, adapters, layer, alpha, dtype)
    facts = {**(base.facts if base is not None else {}), **source.facts}
    return WeightSource(source.label, merged, facts)


def _merged(
    source: WeightSource,
    base: Mapping[str, LazyTensor],
    adapters: Mapping[str, LazyTensor],
    layer: str,
    alpha: float | None,
    dtype: torch.dtype | None,
) -> LazyTensor:
    down, up, weight = (adapters.get(f"{layer}.lora_A"), adapters.get(f"{layer}.lora_B"), base.get(f"{layer}.weight"))
    if down is None or up is None or weight is None:
        missing = [n for n, t in (("lora_A", down), ("lora_B", up), ("the base's weight", weight)) if t is None]
        raise ValueError(f"{source.label}: adapter of {layer} lacks {' and '.join(missing)}")
    rank = down.shape[0]
    if weight.shape != (up.shape[0], down.shape[-1]) or up.shape[-1] != rank:
        raise ValueError(
            f"{source.label}: adapter of {layer} is {list(up.shape)} x {list(down.shape)}, which does not fit its base "
            f"{list(weight.shape)}: adapters of another size of model"
        )
    own = adapters.get(f"{layer}.alpha")
    scale = float(own.read()) if own is not None else source.lora_alpha if source.lora_alpha is not None else alpha
    if scale is None:
        raise ValueError(
            f"{source.label} do not say the alpha of their adapters (rank {rank}): give student.init_lora_alpha"
        )

    def read() -> Tensor:
        return merge(weight.read(), down.read(), up.read(), scale / rank, dtype=dtype)

    return LazyTensor(weight.shape, dtype or weight.dtype, read)
