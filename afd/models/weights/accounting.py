"""Every tensor accounted for: what is missing, unknown or misshapen, and why, before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SHOWN = 3
_FAMILIES = (
    (r"^(double_blocks|single_blocks|txt_in)\.", "a Hunyuan or Flux transformer"),
    (
        r"^(transformer_blocks|single_transformer_blocks)\.",
        "a CogVideoX, LTX or Flux transformer",
    ),
    (r"^(vace_blocks|vace_patch_embedding)\b", "a Wan VACE model, which this student is not"),
    (r"^(face_encoder|motion_encoder|pose_patch_embedding)\b", "a Wan Animate model, which this student is not"),
    (r"^(decoder|quant_conv|post_quant_conv|encoder\.(conv|down|mid))", "a VAE"),
    (r"^(shared\.|encoder\.block|token_embedding|text_model|encoder\.embed_tokens)", "a text encoder"),
    (r"^(vision_model|visual)\.", "an image encoder"),
    (r"^(down_blocks|up_blocks|input_blocks|mid_block)\b", "a U-Net"),
)


def check_names_and_shapes(expected: Mapping[str, Any], got: Mapping[str, Any], *, source: str) -> None:
    """Every tensor accounted for, by name and shape.

    Args:
        expected: the model's, by name; anything with a `shape`.
        got: the file's.
        source: what to call the file.
    Raises:
        ValueError: naming the first mismatches and the likely cause.
    """
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not a parameter of the model" for name in got if name not in expected]
    problems += [
        f"{name} must be {list(expected[name].shape)}, got {list(got[name].shape)}"
        for name in expected
        if name in got and tuple(expected[name].shape) != tuple(got[name].shape)
    ]
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        cause = likely_cause(expected, got)
        reason = f"; likely cause: {cause}" if cause else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems[:SHOWN])}{more}{reason}")


def likely_cause(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    """Why a file does not fit, in words, or None when nothing stands out."""
    if any(".lora_" in name for name in got):
        return "LoRA adapters that were not merged, or adapters without their base"
    family = foreign_family(got)
    if family:
        return f"the file holds {family}: wrong family or the wrong file"
    images = [any("image_embedder" in name or "add_k_proj" in name for name in each) for each in (expected, got)]
    if images[0] != images[1]:
        kinds = {True: "image-to-video", False: "text-to-video"}
        return f"{kinds[images[1]]} weights for a {kinds[images[0]]} model"
    blocks = [count_blocks(each) for each in (expected, got)]
    if blocks[0] != blocks[1]:
        return f"another size of model ({blocks[1]} blocks where {blocks[0]} are expected), or shards are missing"
    widths = [
        tuple(each["patch_embedding.weight"].shape) for each in (expected, got) if "patch_embedding.weight" in each
    ]
    if len(widths) == 2 and widths[0] != widths[1]:
        (want, want_in), (have, have_in) = ((shape[0], shape[1]) for shape in widths)
        if want == have:
            return (
                f"{have_in} input channels where {want_in} are expected: image-to-video (36) and text-to-video (16) "
                "models differ in this"
            )
        return f"another size of model (width {have} where {want} is expected)"
    return None


def count_blocks(tensors: Mapping[str, Any]) -> int:
    """Transformer blocks named in a mapping."""
    return len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})


def foreign_family(tensors: Mapping[str, Any]) -> str | None:
    """What a mapping of names looks like when it is not a Wan transformer's, or None."""
    for pattern, family in _FAMILIES:
        if any(re.match(pattern, name) for name in tensors):
            return family
    return None
