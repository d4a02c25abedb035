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


def discriminator_tensors(shape: DiscriminatorShape) -> tuple[list[int], list[int]]:
    """Elements of a latent discriminator's parameter tensors: of one block, and of everything else."""
    latents = (shape.in_channels, *shape.patch_size)
    layers = [each for each in discriminator_pass(shape, latents, batch=1, text_len=1) if isinstance(each, Matmul)]
    block = _weights_and_biases(each for each in layers if each.in_block)
    outside = _weights_and_biases(each for each in layers if not each.in_block)
    dim, count = shape.dim, len(block) // shape.num_layers
    # Three affine norms, query and key norms of two attentions; the norm before the head.
    return block[:count] + [dim] * 10, [*outside, dim, dim]


def count_discriminator(shape: DiscriminatorShape) -> ParameterCount:
    """Count a latent discriminator's parameters; equal to the built module's."""
    block, outside = (sum(each) for each in discriminator_tensors(shape))
    return ParameterCount(block, outside, shape.num_layers)


def backbone_tensors(shape: StudentShape, section: BackboneSection) -> tuple[list[int], list[int]]:
    """Elements of a backbone discriminator's parameter tensors: frozen ones (the student's blocks up to the last
    tapped one and what is before them), and the heads'."""
    taps, tensors, dim, width = section.taps(shape.num_layers), student_tensors(shape), shape.dim, section.head_width
    queries = section.num_queries * width
    # Norm and projection in; 3 x 3 x 3 convolution; norm; keys and values; queries; the score.
    head = [dim, dim, dim * width, width, 27 * width**2, width, width, width, 2 * width**2, 2 * width, queries]
    return tensors.before + tensors.block * (max(taps) + 1), [*head, queries, 1] * len(taps)


def count_backbone(shape: StudentShape, section: BackboneSection) -> ParameterCount:
    """Count a backbone discriminator's parameters; equal to the built module's."""
    tensors, heads = student_tensors(shape), backbone_tensors(shape, section)[1]
    layers = max(section.taps(shape.num_layers)) + 1
    return ParameterCount(sum(tensors.block), sum(tensors.before), layers, heads=sum(heads))
