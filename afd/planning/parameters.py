"""How many parameters a student, its adapters and a discriminator have, and in how many tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from afd.config import BackboneSection, DiscriminatorShape, LoRASection, StudentShape
from afd.planning.operations import Matmul, discriminator_pass, is_adapted, student_pass


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        block: of one transformer block.
        outside: of everything else.
        num_layers: blocks.
        adapter: of one block's adapters, on top of `block`; 0 without LoRA.
        heads: of what alone is trained on top of frozen blocks; 0 for a model that trains them.
    """

    block: int
    outside: int
    num_layers: int
    adapter: int = 0
    heads: int = 0

    @property
    def total(self) -> int:
        """All of them, adapters and heads included."""
        return self.outside + self.num_layers * (self.block + self.adapter) + self.heads

    @property
    def trained(self) -> int:
        """Those with a gradient: the adapters or heads alone, where there are any."""
        return self.num_layers * self.adapter + self.heads or self.total


@dataclass(frozen=True)
class StudentTensors:
    """Elements of every parameter tensor of a student in the order of a forward (a block's norms at its beginning).

    Attributes:
        before: patches, times, prompts.
        block: of one block.
        adapter: of one block's adapters.
        after: the head.
    """

    before: list[int]
    block: list[int]
    adapter: list[int]
    after: list[int]


_ORDER = ("attn1.", "attn2.to_k", "attn2.to_v", "attn2.", "ffn.")


def student_tensors(shape: StudentShape, lora: LoRASection | None = None) -> StudentTensors:
    """List a student's parameter tensors; equal to the built module's."""
    latents = (shape.in_channels, shape.chunk_frames, shape.patch_size[1], shape.patch_size[2])
    one_layer = shape.model_copy(update={"num_layers": 1})
    layers = [each for each in student_pass(one_layer, latents, batch=1) if isinstance(each, Matmul)]
    block = [each for each in layers if each.in_block]
    block.sort(key=lambda each: next(i for i, name in enumerate(_ORDER) if each.name.startswith(name)))
    *before, head = (each for each in layers if not each.in_block)
    dim, rank = shape.dim, lora.rank if lora is not None else 0
    # The modulation table, query and key norms of two attentions, the affine norm before cross-attention.
    others = [6 * dim, *[dim] * (6 if shape.cross_attn_norm else 4)]
    adapted = [each for each in block if is_adapted(each.name, lora)]
    return StudentTensors(
        before=_weights_and_biases(before),
        block=[*others, *_weights_and_biases(block)],
        adapter=[rank * width for each in adapted for width in (each.inputs, each.outputs)],
        after=[2 * dim, *_weights_and_biases([head])],
    )


def _weights_and_biases(layers: Iterable[Matmul]) -> list[int]:
    return [size for each in layers for size in (each.inputs * each.outputs, each.outputs)]


def count_student(shape: StudentShape, lora: LoRASection | None = None) -> ParameterCount:
    """Count a student's parameters; equal to the built module's."""
    tensors = student_tensors(shape, lora)
    outside = sum(tensors.before) + sum(tensors.after)
    return ParameterCount(sum(tensors.block), outside, shape.num_layers, sum(tensors.adapter))


def adapted_weights(shape: StudentShape, lora: LoRASection) -> int:
    """Elements of the base weights that have an adapter."""
    latents = (shape.in_channels, shape.chunk_frames, shape.patch_size[1], shape.patch_size[2])
    layers = [each for each in student_pass(shape, latents, batch=1) if isinstance(each, Matmul) and each.in_block]
    return sum(each.inputs * each.outputs for each in layers if is_adapted(each.name, lora))


def count_discriminator(shape: DiscriminatorShape) -> ParameterCount:
    """Count a latent discriminator's parameters; equal to the built module's."""
    latents = (shape.in_channels, *shape.patch_size)
    layers = [each for each in discriminator_pass(shape, latents, batch=1, text_len=1) if isinstance(each, Matmul)]
    dim = shape.dim
    block = sum(each.inputs * each.outputs + each.outputs for each in layers if each.in_block) // shape.num_layers
    outside = sum(each.inputs * each.outputs + each.outputs for each in layers if not each.in_block)
    # Three affine norms, query and key norms of two attentions; the norm before the head.
    return ParameterCount(block + 10 * dim, outside + 2 * dim, shape.num_layers)


def count_backbone(shape: StudentShape, section: BackboneSection) -> ParameterCount:
    """Count a backbone discriminator's parameters: the student's blocks up to the last tapped one, and the heads."""
    taps, whole, dim, width = section.taps(shape.num_layers), count_student(shape), shape.dim, section.head_width
    out = shape.out_channels * shape.patch_size[1] * shape.patch_size[2]
    behind = dim * out + out + 2 * dim
    # Norm and projection in; 3 x 3 x 3 convolution; norm; keys and values; queries; the score.
    head = 2 * dim + dim * width + width + 27 * width**2 + width + 2 * width + 2 * width**2 + 2 * width
    head += 2 * section.num_queries * width + 1
    return ParameterCount(whole.block, whole.outside - behind, max(taps) + 1, heads=len(taps) * head)
