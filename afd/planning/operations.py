"""Matrix products and attentions of one pass through the student and the discriminator: parameters and FLOPs from them.

Owns the list of operations; the numbers equal torch's FlopCounterMode on the real models (tests). Elementwise work is
not counted: it is limited by memory, not by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from afd.config import BackboneSection, DiscriminatorShape, LoRASection, StudentShape
from afd_kernels import BlockCausalLayout


@dataclass(frozen=True)
class Matmul:
    """A linear layer (or a patch convolution) applied to `rows` vectors.

    Attributes:
        name: diffusers' name without the block's index.
        rows: vectors it is applied to.
        inputs, outputs: widths.
        is_trained: its weight gets a gradient.
        has_input_grad: its input gets a gradient.
        in_block: part of a transformer block, hence computed again under gradient checkpointing.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    is_trained: bool = True
    has_input_grad: bool = True
    in_block: bool = True

    @property
    def forward(self) -> int:
        """FLOPs of y = x W."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def backward(self) -> int:
        """FLOPs of dW and dx, as far as they are asked for."""
        return self.forward * (self.is_trained + self.has_input_grad)


@dataclass(frozen=True)
class Attention:
    """Softmax attention over `pairs` visible (query, key) pairs, all samples together.

    The backward computes the scores again, as every flash kernel does: 5 products against the forward's 2.
    """

    name: str
    pairs: int
    width: int
    in_block: bool = True

    @property
    def forward(self) -> int:
        """FLOPs of q k^T and p v."""
        return 4 * self.pairs * self.width

    @property
    def backward(self) -> int:
        """FLOPs of the scores again, dP, dV, dQ, dK."""
        return 10 * self.pairs * self.width


Operation = Matmul | Attention


def forward_flops(operations: list[Operation]) -> int:
    """FLOPs of one pass without gradient."""
    return sum(operation.forward for operation in operations)


def training_flops(operations: list[Operation], *, is_checkpointed: bool) -> int:
    """FLOPs of forward and backward; with gradient checkpointing every block's forward runs twice."""
    again = sum(operation.forward for operation in operations if operation.in_block) if is_checkpointed else 0
    return forward_flops(operations) + sum(operation.backward for operation in operations) + again


def video_grid(shape: StudentShape | DiscriminatorShape, latents: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """(frames, rows, columns) of tokens for latents (C, F, H, W)."""
    frames, rows, columns = (size // patch for size, patch in zip(latents[1:], shape.patch_size, strict=True))
    return frames, rows, columns


def student_layout(
    shape: StudentShape, latents: tuple[int, int, int, int], *, teacher_forcing: bool
) -> BlockCausalLayout:
    """Who sees whom in one pass over a video."""
    frames, rows, columns = video_grid(shape, latents)
    return BlockCausalLayout(
        num_frames=frames,
        tokens_per_frame=rows * columns,
        chunk_frames=shape.chunk_frames,
        window_frames=shape.window_frames,
        sink_frames=shape.sink_frames,
        first_chunk_frames=shape.first_chunk_frames,
        teacher_forcing=teacher_forcing,
    )


def student_pass(
    shape: StudentShape, latents: tuple[int, int, int, int], *, batch: int, lora: LoRASection | None = None,
    teacher_forcing: bool = True,
) -> list[Operation]:  # fmt: skip
    """One pass over whole videos, in the teacher-forcing layout as in the student's update, or as a score has it.

    Args:
        shape: the student's.
        latents: (C, F, H, W) of a clip.
        batch: clips.
        lora: adapters; then the base weights are frozen.
        teacher_forcing: [clean | noisy]; else the noised clips alone.
    """
    layout = student_layout(shape, latents, teacher_forcing=teacher_forcing)
    tokens, frames = batch * layout.num_tokens, (1 + teacher_forcing) * layout.num_frames
    adapted = lora is not None and lora.rank > 0
    operations = _embedders(shape, tokens=tokens, times=batch * frames, prompts=batch, trains=not adapted)
    prompt = batch * shape.text_len
    for _ in range(shape.num_layers):
        operations += _block(
            shape, tokens=tokens, prompt=prompt, pairs=batch * layout.area, lora=lora if adapted else None
        )
    head = _head(shape)
    operations.append(Matmul("proj_out", batch * layout.video_tokens, *head, is_trained=not adapted, in_block=False))
    return operations


def rollout_passes(
    shape: StudentShape,
    latents: tuple[int, int, int, int],
    *,
    batch: int,
    num_times: int,
    lora: LoRASection | None,
    first_chunk_times: int | None = None,
) -> list[Operation]:
    """All forwards of one KV-cached rollout: per chunk `num_times` denoising passes and one that writes the cache.

    The first chunk has `first_chunk_times` where they differ; after the last one nothing is written.
    """
    layout = student_layout(shape, latents, teacher_forcing=False)
    adapters = lora if lora is not None and lora.rank else None
    prompt, per_frame, last = batch * shape.text_len, layout.tokens_per_frame, layout.num_chunks - 1
    operations: list[Operation] = _text_embedder(shape, prompts=batch, trains=False)
    for _ in range(shape.num_layers):
        operations += _adapted(_prompt_projections(shape, prompt, trains=False), adapters)
    for chunk, (start, end) in enumerate(layout.chunk_spans):
        tokens = batch * (end - start) * per_frame
        visible = sum(stop - begin for begin, stop in layout.visible_frames(chunk)) * per_frame
        one = _time_embedder(shape, tokens=tokens, times=batch * (end - start), trains=False)
        for _ in range(shape.num_layers):
            one += _adapted(_token_projections(shape, tokens, trains=False), adapters)
            one += [Attention("attn1", tokens * visible, shape.dim), _cross(shape, tokens)]
        one.append(Matmul("proj_out", tokens, *_head(shape), in_block=False))
        passes = first_chunk_times if chunk == 0 and first_chunk_times is not None else num_times
        operations += one * (passes + (chunk < last))
    return operations


def discriminator_pass(
    shape: DiscriminatorShape, latents: tuple[int, int, int, int], *, batch: int, text_len: int
) -> list[Operation]:
    """One pass of the latent discriminator over `batch` clips."""
    frames, rows, columns = video_grid(shape, latents)
    per_clip = frames * rows * columns
    tokens, prompt, dim = batch * per_clip, batch * text_len, shape.dim
    patch = shape.in_channels * shape.patch_size[0] * shape.patch_size[1] * shape.patch_size[2]
    operations: list[Operation] = [
        Matmul("patch_embedding", tokens, patch, dim, has_input_grad=False, in_block=False),
        Matmul("text_embedding", prompt, shape.text_dim, dim, has_input_grad=False, in_block=False),
    ]
    for _ in range(shape.num_layers):
        operations += [Matmul(f"attn1.to_{name}", tokens, dim, dim) for name in ("q", "k", "v", "out.0")]
        operations += [Matmul(f"attn2.to_{name}", tokens, dim, dim) for name in ("q", "out.0")]
        operations += [Matmul(f"attn2.to_{name}", prompt, dim, dim) for name in ("k", "v")]
        operations += [Matmul("expand", tokens, dim, shape.ffn_dim), Matmul("contract", tokens, shape.ffn_dim, dim)]
        operations += [Attention("attn1", tokens * per_clip, dim), Attention("attn2", tokens * text_len, dim)]
    return [*operations, Matmul("head", batch, dim, 1, in_block=False)]


def backbone_pass(
    shape: StudentShape, section: BackboneSection, latents: tuple[int, int, int, int], *, batch: int
) -> tuple[list[Operation], list[Operation]]:
    """One pass of the backbone discriminator over `batch` clips: the frozen blocks, and the heads that are trained."""
    grid, taps, width = video_grid(shape, latents), section.taps(shape.num_layers), section.head_width
    per_clip = grid[0] * grid[1] * grid[2]
    tokens, prompt = batch * per_clip, batch * shape.text_len
    frozen = _embedders(shape, tokens=tokens, times=batch * grid[0], prompts=batch, trains=False)
    for _ in range(max(taps) + 1):
        layers = [*_token_projections(shape, tokens, trains=False), *_prompt_projections(shape, prompt, trains=False)]
        frozen += [*layers, Attention("attn1", tokens * per_clip, shape.dim), _cross(shape, tokens)]
    heads: list[Operation] = []
    for _ in taps:
        heads += [
            Matmul("project", tokens, shape.dim, width, in_block=False),
            Matmul("mix", tokens, 27 * width, width, in_block=False),
            Matmul("keys_values", tokens, width, 2 * width, in_block=False),
            Attention("pooling", tokens * section.num_queries, width),
            Matmul("score", batch, section.num_queries * width, 1, in_block=False),
        ]
    return frozen, heads


_BESIDE = ("text_embedding", "condition_embedder", "attn2.to_k", "attn2.to_v")  # of prompts and times, not of clips


def slope_pass(operations: list[Operation]) -> list[Operation]:
    """A discriminator's pass with frozen weights, where the gradient at its clips is asked for."""
    return [
        replace(each, is_trained=False, has_input_grad=not each.name.startswith(_BESIDE))
        if isinstance(each, Matmul)
        else each
        for each in operations
    ]


def _head(shape: StudentShape) -> tuple[int, int]:
    return shape.dim, shape.out_channels * shape.patch_size[1] * shape.patch_size[2]


def _embedders(shape: StudentShape, *, tokens: int, times: int, prompts: int, trains: bool) -> list[Operation]:
    return [
        *_time_embedder(shape, tokens=tokens, times=times, trains=trains),
        *_text_embedder(shape, prompts=prompts, trains=trains),
    ]


def _time_embedder(shape: StudentShape, *, tokens: int, times: int, trains: bool) -> list[Operation]:
    """Patches and times; frozen, neither gets a gradient."""
    dim, patch = shape.dim, shape.in_channels * shape.patch_size[1] * shape.patch_size[2]
    embedder = "condition_embedder.time_embedder"

    def layer(name: str, rows: int, inputs: int, outputs: int, *, first: bool) -> Matmul:
        return Matmul(name, rows, inputs, outputs, trains, trains and not first, in_block=False)

    return [
        layer("patch_embedding", tokens, patch, dim, first=True),
        layer(f"{embedder}.linear_1", times, shape.freq_dim, dim, first=True),
        layer(f"{embedder}.linear_2", times, dim, dim, first=False),
        layer("condition_embedder.time_proj", times, dim, 6 * dim, first=False),
    ]


def _text_embedder(shape: StudentShape, *, prompts: int, trains: bool) -> list[Operation]:
    rows, name = prompts * shape.text_len, "condition_embedder.text_embedder"
    return [
        Matmul(f"{name}.linear_1", rows, shape.text_dim, shape.dim, trains, False, in_block=False),
        Matmul(f"{name}.linear_2", rows, shape.dim, shape.dim, trains, trains, in_block=False),
    ]


def _token_projections(shape: StudentShape, tokens: int, *, trains: bool) -> list[Matmul]:
    dim, ffn = shape.dim, shape.ffn_dim
    square = [*(f"attn1.to_{name}" for name in ("q", "k", "v", "out.0")), "attn2.to_q", "attn2.to_out.0"]
    layers = [Matmul(name, tokens, dim, dim, trains) for name in square]
    return [*layers, Matmul("ffn.net.0.proj", tokens, dim, ffn, trains), Matmul("ffn.net.2", tokens, ffn, dim, trains)]


def _prompt_projections(shape: StudentShape, prompt: int, *, trains: bool) -> list[Matmul]:
    """Frozen text embedders leave the prompt without a gradient."""
    return [Matmul(f"attn2.to_{name}", prompt, shape.dim, shape.dim, trains, trains) for name in ("k", "v")]


def _cross(shape: StudentShape, tokens: int) -> Attention:
    return Attention("attn2", tokens * shape.text_len, shape.dim)


def _block(
    shape: StudentShape, *, tokens: int, prompt: int, pairs: int, lora: LoRASection | None
) -> Iterator[Operation]:
    trains = lora is None
    layers = [*_token_projections(shape, tokens, trains=trains), *_prompt_projections(shape, prompt, trains=trains)]
    yield from _adapted(layers, lora)
    yield Attention("attn1", pairs, shape.dim)
    yield _cross(shape, tokens)


def is_adapted(name: str, lora: LoRASection | None) -> bool:
    """Whether a layer gets an adapter: peft matches suffixes of names."""
    targets = () if lora is None or not lora.rank else lora.targets
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _adapted(layers: list[Matmul], lora: LoRASection | None) -> Iterator[Operation]:
    """Each layer, followed by the two products of its adapter."""
    for layer in layers:
        yield layer
        if lora is not None and is_adapted(layer.name, lora):
            yield Matmul(f"{layer.name}.lora_A", layer.rows, layer.inputs, lora.rank, True, layer.has_input_grad)
            yield Matmul(f"{layer.name}.lora_B", layer.rows, lora.rank, layer.outputs)
