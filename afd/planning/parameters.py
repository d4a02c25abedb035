"""How many parameters a student, its adapters and a discriminator have, and in how many tensors."""

from __future__ import annotations

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


def count_student(shape: StudentShape, lora: LoRASection | None = None) -> ParameterCount:
    """Count a student's parameters; equal to the built module's."""
    latents = (shape.in_channels, shape.chunk_frames, shape.patch_size[1], shape.patch_size[2])
    layers = [each for each in student_pass(shape, latents, batch=1) if isinstance(each, Matmul)]
    dim, block = shape.dim, [each for each in layers if each.in_block]
    per_block = sum(each.inputs * each.outputs + each.outputs for each in block) // shape.num_layers
    # Query and key norms of two attentions, the affine norm before cross-attention, the modulation table.
    per_block += 4 * dim + (2 * dim if shape.cross_attn_norm else 0) + 6 * dim
    outside = sum(each.inputs * each.outputs + each.outputs for each in layers if not each.in_block) + 2 * dim
    rank = lora.rank if lora is not None else 0
    adapted = [each for each in block if is_adapted(each.name, lora)]
    adapter = sum(rank * (each.inputs + each.outputs) for each in adapted) // shape.num_layers
    return ParameterCount(per_block, outside, shape.num_layers, adapter)


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
