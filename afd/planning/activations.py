"""Bytes that a forward pass keeps for its backward, tensor by tensor, for both ways of running it.

`eager` is the reference path (CPU), `fused` the Triton kernels (CUDA). Counts are per distinct storage, parameters
excluded, and follow `CausalBlock.forward` line by line; the eager ones equal what autograd saves (tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afd.config import BackboneSection, DiscriminatorShape, StudentShape
from afd.planning.operations import student_layout, video_grid
from afd_kernels import BlockCausalLayout

Kernels = Literal["eager", "fused"]
_STAT = 4  # means, deviations and softmax statistics are float32 in every path


@dataclass(frozen=True)
class PassShape:
    """What decides the activations of one training pass of a velocity model.

    Attributes:
        shape, latents: the model's and the clip's (C, F, H, W).
        batch: clips in a micro batch.
        width: bytes of an activation, 2 or 4.
        kernels: which implementation runs.
        copies_keys: the attention gathers every chunk's keys (`chunks`, `varlen`) instead of reading them in place.
        is_adapted: LoRA; frozen weights save less.
        lora_rank: r of the adapters.
        teacher_forcing: [clean | noisy], as in the student's update; else the noised clip alone.
    """

    shape: StudentShape
    latents: tuple[int, int, int, int]
    batch: int
    width: int
    kernels: Kernels
    copies_keys: bool = True
    is_adapted: bool = False
    lora_rank: int = 0
    teacher_forcing: bool = True

    @property
    def layout(self) -> BlockCausalLayout:
        """Who sees whom."""
        return student_layout(self.shape, self.latents, teacher_forcing=self.teacher_forcing)

    @property
    def copies(self) -> int:
        """Of a clip: clean and noisy, or noisy alone."""
        return 1 + self.teacher_forcing

    @property
    def tokens(self) -> int:
        """Tokens of the micro batch, all copies."""
        return self.batch * self.layout.num_tokens

    @property
    def times(self) -> int:
        """Embedded times of the micro batch: a frame's, in all copies."""
        return self.batch * self.copies * self.layout.num_frames


def copied_keys(layout: BlockCausalLayout) -> int:
    """Tokens of keys (and of values) that chunk-wise attention copies: those of chunks that see several ranges."""
    return sum(sum(end - start for start, end in s.ranges) for s in layout.strips if len(s.ranges) > 1)


def block_saved_bytes(one: PassShape) -> int:
    """Bytes one transformer block keeps for its backward."""
    shape, tokens, dim = one.shape, one.tokens, one.shape.dim
    token_tensors = _eager_token_tensors(one) if one.kernels == "eager" else _fused_token_tensors(one)
    times, prompt = one.times, one.batch * shape.text_len
    saved = token_tensors * tokens * dim * one.width
    saved += 2 * tokens * shape.ffn_dim * one.width  # before and after GELU
    saved += 2 * tokens * shape.num_heads * _STAT  # log-sum-exp of both attentions
    saved += 6 * times * dim * one.width  # the modulation table of this block
    saved += (3 if one.is_adapted else 4) * prompt * dim * one.width + prompt * _STAT  # prompt: k, normed k, k w, v
    saved += tokens * (3 if shape.cross_attn_norm else 1) * _STAT  # statistics of norm2 and of the query norm
    if one.kernels == "eager":
        saved += 6 * tokens * _STAT  # of two LayerNorms, of q's and k's norm
        saved += one.layout.num_tokens * shape.head_dim * _STAT  # complex rotations
        saved += 2 * times * dim * one.width  # 1 + scale, twice
    if one.copies_keys:
        saved += 2 * one.batch * copied_keys(one.layout) * dim * one.width
    if one.is_adapted:
        saved += 8 * tokens * one.lora_rank * one.width
    return saved


def _eager_token_tensors(one: PassShape) -> int:
    """[tokens, dim] tensors kept: x, normed, projections' input; q, k and their norms; q, k, v rotated; out and its
    projection's input; y; then norm2's input and output, q, its norm, q w, out; x, normed, input, y of the
    feed-forward. Frozen weights need neither the normed q, k, q nor the four operands of the modulation's gradient."""
    return (16 if one.is_adapted else 23) - (0 if one.shape.cross_attn_norm else 1)


def _fused_token_tensors(one: PassShape) -> int:
    """x; projections' input; q, k; q, k, v rotated, out and its projection's input; y; norm2's input and output, q in
    float32, its norm, q w, out; x, input, y of the feed-forward."""
    query_norm = (4 // one.width) + (0 if one.is_adapted else 1)
    return 17 + query_norm - (0 if one.shape.cross_attn_norm else 1)


def outside_saved_bytes(one: PassShape) -> int:
    """Bytes kept outside the blocks: inputs, embeddings of times and prompt, the head."""
    shape, dim, noisy = one.shape, one.shape.dim, one.tokens // one.copies
    channels, frames, height, width = one.latents
    times, prompt = one.times, one.batch * shape.text_len
    clips = one.copies * one.batch * channels * frames * height * width
    inputs = 0 if one.is_adapted else clips + prompt * shape.text_dim
    embeddings = 0 if one.is_adapted else times * (shape.freq_dim + 4 * dim) + 2 * prompt * dim
    head = 2 * noisy * dim + (times // one.copies) * dim  # normed and projected noisy part, 1 + scale
    saved = (inputs + embeddings + prompt * dim + head + one.tokens * dim) * one.width
    return saved + 2 * noisy * _STAT


def saved_bytes(one: PassShape, *, is_checkpointed: bool) -> int:
    """Bytes kept at the end of a forward; with checkpointing, every block's input and one block at a time."""
    layers, block = one.shape.num_layers, block_saved_bytes(one)
    inputs = one.tokens * one.shape.dim * one.width
    return outside_saved_bytes(one) + (layers * inputs + block if is_checkpointed else layers * block)


def forward_workspace_bytes(one: PassShape) -> int:
    """Tensors alive at once inside a block's forward without gradient."""
    float32 = 2 if one.width == 2 and one.kernels == "fused" else 1
    return one.tokens * (6 * one.shape.dim * float32 + 2 * one.shape.ffn_dim) * one.width


def backward_workspace_bytes(one: PassShape) -> int:
    """Gradients alive at once inside a block's backward: of x and of the feed-forward's hidden layer."""
    return one.tokens * (one.shape.dim + one.shape.ffn_dim) * one.width


def discriminator_saved_bytes(
    shape: DiscriminatorShape, latents: tuple[int, int, int, int], *, batch: int, text_len: int, width: int,
    kernels: Kernels,
) -> int:  # fmt: skip
    """Bytes a pass of the discriminator over `batch` clips keeps: 18 [tokens, dim] tensors and two of the
    feed-forward a block (15 fused)."""
    frames, rows, columns = video_grid(shape, latents)
    tokens, dim = batch * frames * rows * columns, shape.dim
    per_token = (22 if kernels == "eager" else 18) * dim + 2 * shape.ffn_dim
    block = tokens * per_token * width + tokens * (9 + 2 * shape.num_heads) * _STAT + 5 * batch * text_len * dim * width
    channels, num_frames, height, columns = latents
    inputs = batch * (channels * num_frames * height * columns + text_len * (shape.text_dim + dim))
    return shape.num_layers * block + (inputs + 2 * tokens * dim) * width


def discriminator_slope_bytes(
    shape: DiscriminatorShape, latents: tuple[int, int, int, int], *, batch: int, text_len: int, width: int
) -> int:
    """Bytes a pass of the frozen discriminator keeps for the gradient at its `batch` clips: 12 [tokens, dim] tensors
    and one of the feed-forward a block, the prompt's keys and values."""
    frames, rows, columns = video_grid(shape, latents)
    tokens, dim = batch * frames * rows * columns, shape.dim
    block = tokens * (12 * dim + shape.ffn_dim) * width + tokens * (9 + 2 * shape.num_heads) * _STAT
    return shape.num_layers * (block + 2 * batch * text_len * dim * width) + 2 * tokens * dim * width


def backbone_saved_bytes(
    shape: StudentShape, section: BackboneSection, latents: tuple[int, int, int, int], *, batch: int, width: int,
    kernels: Kernels,
) -> int:  # fmt: skip
    """Bytes a pass of the backbone discriminator needs: features and what the heads keep for their backward, or before
    them the features and one frozen block at work."""
    frames, rows, columns = video_grid(shape, latents)
    tokens, taps = batch * frames * rows * columns, len(section.taps(shape.num_layers))
    heads = taps * tokens * ((2 * shape.dim + 8 * section.head_width) * width + 4 * _STAT)
    float32 = 2 if width == 2 and kernels == "fused" else 1
    return max(heads, tokens * ((taps - 1 + 6 * float32) * shape.dim + 2 * shape.ffn_dim) * width)


def backbone_slope_bytes(
    shape: StudentShape, section: BackboneSection, latents: tuple[int, int, int, int], *, batch: int, width: int
) -> int:
    """Bytes a pass of the backbone discriminator keeps for the gradient at its `batch` clips: 13 [tokens, dim] tensors
    and one of the feed-forward a frozen block (with recomputation its input, and one block), and the frozen heads'."""
    frames, rows, columns = video_grid(shape, latents)
    tokens, dim, taps = batch * frames * rows * columns, shape.dim, section.taps(shape.num_layers)
    block = tokens * (13 * dim + shape.ffn_dim) * width + tokens * (9 + 2 * shape.num_heads) * _STAT
    block += 2 * batch * (shape.text_len + frames) * dim * width  # prompt's keys and values, 1 + scale of the times
    heads = len(taps) * tokens * ((dim + 5 * section.head_width) * width + 4 * _STAT)
    blocks = max(taps) + 1
    return heads + (blocks * tokens * dim * width + block if section.gradient_checkpointing else blocks * block)
