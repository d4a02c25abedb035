"""Names of a Wan transformer's tensors: the original code's, wrappers' prefixes, adapters', and diffusers' (ours)."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Original name -> diffusers' name, as stems: each stands for itself and for everything below it.
_TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    # The originals' norm1 and norm2 have no parameters; norm3 is the affine one before cross-attention.
    "norm3": "norm2",
    **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_BLOCK_BACK = {new: old for old, new in _BLOCK.items()}
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")
_PREFIXES = ("base_model.model.", "module.", "model.", "diffusion_model.", "transformer.", "generator.")
# Written by some conversions to diffusers and read by no model.
_IGNORED = re.compile(r"(^freqs$|\.norm_added_q\.weight$)")


def bare_name(name: str) -> str:
    """A name without what FSDP, activation checkpointing, torch.compile, DDP, peft and pipelines put before it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    stripped = True
    while stripped:
        before = name
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        stripped = name != before
    return name


def diffusers_name(name: str) -> str:
    """Rename one tensor of the original Wan code, wrapped or not, to diffusers' name; diffusers' own stay."""
    return _rename(bare_name(name), _TOP, _BLOCK)


def original_name(name: str) -> str:
    """Rename one tensor from diffusers' name to the original Wan code's."""
    return _rename(name, _TOP_BACK, _BLOCK_BACK)


def is_ignored(name: str) -> bool:
    """True for tensors that some files carry and no model reads (RoPE tables, an unused norm)."""
    return _IGNORED.search(name) is not None


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"(blocks\.\d+\.)(.*)", name)
    head, rest, table = (match[1], match[2], block) if match else ("", name, top)
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):
        stem = ".".join(parts[:length])
        if stem in table:
            return head + table[stem] + rest[len(stem) :]
    return name
