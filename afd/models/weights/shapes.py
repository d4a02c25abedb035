"""A student's dimensions from its file: what tensors show, what the file says, and what only the caller knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from afd.config import StudentSection, StudentShape
from afd.models.weights.accounting import count_blocks, foreign_family
from afd.models.weights.sources import WeightSource

WAN_HEAD_DIM = 128  # of every released Wan model
WAN_TEXT_LEN = 512
_NEEDED = (
    "patch_embedding.weight",
    "proj_out.weight",
    "condition_embedder.time_embedder.linear_1.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "blocks.0.ffn.net.0.proj.weight",
)
# What the caller may choose against the file: how the student attends, pads and rounds.
_FREE = frozenset(
    {
        *("chunk_frames", "first_chunk_frames", "window_frames", "sink_frames"),
        *("text_len", "numerics", "attention_impl", "eps"),
    }
)


def resolve_shape(source: WeightSource, config: Mapping[str, Any] | None = None) -> StudentShape:
    """The student's dimensions; from the file wherever it tells.

    Heads default to 128 wide and text to 512 tokens, as in every released Wan model, when nobody says otherwise.

    Args:
        source: merged weights (no adapters left).
        config: fields of the configuration's student section; others than dimensions are passed over.
    Raises:
        ValueError: not a Wan transformer, or the file, its config.json and `config` contradict each other.
    """
    given = _given(config or {})
    shown = _shown(source) if set(_NEEDED) <= source.tensors.keys() else {}
    facts = {name: tuple(value) if isinstance(value, list) else value for name, value in source.facts.items()}
    if not shown and not facts:
        raise ValueError(f"{source.label} do not hold a Wan transformer: {_why_not(source)}")
    for name in shown.keys() & facts.keys():
        if shown[name] != facts[name]:
            raise ValueError(
                f"{source.label}: config.json says {name} {facts[name]}, the tensors show {shown[name]}: another "
                "model's config.json, or shards are missing"
            )
    known = {**shown, **facts}
    for name, value in given.items():
        if name in known and name not in _FREE and value != known[name]:
            raise ValueError(f"student.{name} must be {known[name]}, as in {source.label}, got {value}")
    known = {"text_len": WAN_TEXT_LEN, **known, **given}
    width = known.pop("dim", None) or known["num_heads"] * known["head_dim"]
    return StudentShape.model_validate(known | _heads(source, known, width))


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    known = StudentShape.model_fields.keys() | StudentSection.model_fields.keys()
    for name in config:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ValueError(f"config holds {name}, which is not a field of the student section{hint}")
    given = {name: config[name] for name in StudentShape.model_fields if config.get(name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _shown(source: WeightSource) -> dict[str, Any]:
    """Dimensions that the tensors' shapes tell; `dim` among them."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    patch = shapes["patch_embedding.weight"]
    if len(patch) != 5:
        raise ValueError(f"{source.label}: patch_embedding.weight must be [dim, channels, 1, h, w], got {list(patch)}")
    volume = patch[2] * patch[3] * patch[4]
    image = "condition_embedder.image_embedder"
    return {
        "dim": patch[0],
        "in_channels": patch[1],
        "out_channels": shapes["proj_out.weight"][0] // volume,
        "patch_size": tuple(patch[2:]),
        "num_layers": count_blocks(shapes),
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        **({"image_dim": shapes[f"{image}.norm1.weight"][0]} if f"{image}.norm1.weight" in shapes else {}),
        **({"image_tokens": shapes[f"{image}.pos_embed"][1]} if f"{image}.pos_embed" in shapes else {}),
    }


def _heads(source: WeightSource, known: Mapping[str, Any], width: int) -> dict[str, int]:
    """`num_heads` and `head_dim`, from what is known of them."""
    heads: int | None = known.get("num_heads")
    head_dim: int = known.get("head_dim") or (WAN_HEAD_DIM if heads is None else width // heads)
    heads = heads or width // head_dim
    if heads < 1 or heads * head_dim != width:
        raise ValueError(
            f"student.num_heads must divide the width {width} of {source.label} (tensor shapes do not tell it), "
            f"got {heads} heads of {head_dim}"
        )
    return {"num_heads": heads, "head_dim": head_dim}


def _why_not(source: WeightSource) -> str:
    family = foreign_family(source.tensors)
    if family:
        return f"the names look like {family}"
    missing = [name for name in _NEEDED if name not in source.tensors]
    return f"{', '.join(missing[:2])} missing among {len(source.tensors)} tensors such as {sorted(source.tensors)[:3]}"
