"""Who sees whom in block-causal video attention, as a set of full rectangles.

One frozen description serves every implementation: the range table drives the Triton kernels and the chunk loop, the
dense mask the reference, the BlockMask FlexAttention, and `visible_frames` the KV-cached rollout. Owns no attention
arithmetic. The picture lives in `layout_plot.py` (`python -m afd_kernels.layout --plot`).

Vocabulary: a *chunk* is a run of frames that are generated together and see each other; a *range* is a half-open span
of token positions; a *rectangle* is (query range) x (key range) in which every query sees every key.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Range = tuple[int, int]


class Rectangle(NamedTuple):
    """Every query in [query_start, query_end) sees every key in [key_start, key_end); token positions."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


class Strip(NamedTuple):
    """One span of tokens [start, end) and the ranges of the other side that all of it sees or is seen by."""

    start: int
    end: int
    ranges: tuple[Range, ...]


def merge_ranges(ranges: list[Range]) -> tuple[Range, ...]:
    """Sort half-open ranges, drop empty ones and join those that touch or overlap."""
    merged: list[Range] = []
    for start, end in sorted(r for r in ranges if r[1] > r[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def chunk_spans(num_frames: int, chunk_frames: int, first_chunk_frames: int | None = None) -> tuple[Range, ...]:
    """Frames [start, end) of each chunk, in order; the last chunk may be shorter."""
    first = min(first_chunk_frames or chunk_frames, num_frames)
    starts = [0, *range(first, num_frames, chunk_frames)]
    return tuple(zip(starts, [*starts[1:], num_frames], strict=True))


def whole_chunk_spans(num_frames: int, chunk_frames: int, first_chunk_frames: int | None = None) -> tuple[Range, ...]:
    """`chunk_spans` of a video that fills its chunks.

    Raises:
        ValueError: the last chunk would be shorter than the others.
    """
    spans = chunk_spans(num_frames, chunk_frames, first_chunk_frames)
    first = first_chunk_frames or chunk_frames
    start, end = spans[-1]
    if end - start != (chunk_frames if start else first):
        raise ValueError(
            f"num_frames must be {first} + a multiple of the student's chunk {chunk_frames}, got {num_frames}"
        )
    return spans


@dataclass(frozen=True)
class BlockCausalLayout:
    """Block-causal attention over video frames; hashable, so it can key caches.

    A query in a chunk that ends before frame `b` sees the frames [b - window_frames, b) and, on top, [0, sink_frames)
    as far as they are not later than its chunk. Without `window_frames` it sees [0, b).

    Teacher forcing: the sequence is [clean | noisy], twice num_frames * tokens_per_frame tokens. A clean chunk sees
    clean chunks as above. A noisy chunk sees the *clean* frames before it (window and sink honoured) and itself, which
    is what a KV-cached rollout computes for a chunk that is being denoised.

    The public Self-Forcing code counts every frame it keeps, sink and current chunk included: its window W with sink S
    is `window_frames = W - S, sink_frames = S` here.

    Args:
        num_frames: latent frames F; > 0.
        tokens_per_frame: tokens of one frame after patching; > 0.
        chunk_frames: frames per chunk; the last chunk may be shorter; > 0.
        window_frames: frames a query may see, ending with the last frame of its own chunk; None for all.
        sink_frames: first frames that stay visible outside the window; >= 0.
        first_chunk_frames: frames of the first chunk where it differs (1: an independent first image); None: as others.
        teacher_forcing: use the [clean | noisy] sequence.
    Raises:
        ValueError: a count is out of range, or the window is shorter than a chunk.
    Source: guandeh17/Self-Forcing wan/modules/causal_model.py (masks, rolling KV cache), for the semantics.
    """

    num_frames: int
    tokens_per_frame: int
    chunk_frames: int
    window_frames: int | None = None
    sink_frames: int = 0
    first_chunk_frames: int | None = None
    teacher_forcing: bool = False

    def __post_init__(self) -> None:
        for name in ("num_frames", "tokens_per_frame", "chunk_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames must be at least 0, got {self.sink_frames}")
        if self.first_chunk_frames is not None and not 1 <= self.first_chunk_frames <= self.num_frames:
            raise ValueError(f"first_chunk_frames must be in [1, {self.num_frames}], got {self.first_chunk_frames}")
        longest = max(end - start for start, end in self.chunk_spans)
        if self.window_frames is not None and self.window_frames < longest:
            raise ValueError(
                f"window_frames must hold the longest chunk ({longest} frames), else a query does not see its own "
                f"chunk; got {self.window_frames}"
            )

    @functools.cached_property
    def chunk_spans(self) -> tuple[Range, ...]:
        """Frames [start, end) of each chunk, in order."""
        return chunk_spans(self.num_frames, self.chunk_frames, self.first_chunk_frames)

    @property
    def num_chunks(self) -> int:
        """Chunks of one copy of the video."""
        return len(self.chunk_spans)

    @property
    def video_tokens(self) -> int:
        """Tokens of one copy of the video: num_frames * tokens_per_frame."""
        return self.num_frames * self.tokens_per_frame

    @property
    def num_tokens(self) -> int:
        """Sequence length of queries and of keys; twice `video_tokens` with teacher forcing."""
        return self.video_tokens * (2 if self.teacher_forcing else 1)

    def past_frames(self, chunk: int) -> tuple[Range, ...]:
        """Frames [start, end) *before* a chunk that it sees: what a KV cache must hold when the chunk is generated.

        Raises:
            ValueError: no such chunk.
        """
        if not 0 <= chunk < self.num_chunks:
            raise ValueError(f"chunk must be in [0, {self.num_chunks}), got {chunk}")
        start, end = self.chunk_spans[chunk]
        oldest = 0 if self.window_frames is None else max(0, end - self.window_frames)
        return merge_ranges([(0, min(self.sink_frames, start)), (oldest, start)])

    def visible_frames(self, chunk: int) -> tuple[Range, ...]:
        """Frames [start, end) that a chunk sees, its own included."""
        return merge_ranges([*self.past_frames(chunk), self.chunk_spans[chunk]])

    @functools.cached_property
    def strips(self) -> tuple[Strip, ...]:
        """One strip per query chunk with the key ranges it sees; covers every query once, in order."""
        scale = self.tokens_per_frame

        def tokens(ranges: tuple[Range, ...], offset: int = 0) -> list[Range]:
            return [(offset + start * scale, offset + end * scale) for start, end in ranges]

        strips = []
        for chunk, span in enumerate(self.chunk_spans):
            ((start, end),) = tokens((span,))
            strips.append(Strip(start, end, merge_ranges(tokens(self.visible_frames(chunk)))))
        if not self.teacher_forcing:
            return tuple(strips)
        for chunk, span in enumerate(self.chunk_spans):
            own = tokens((span,), self.video_tokens)
            strips.append(Strip(*own[0], merge_ranges([*tokens(self.past_frames(chunk)), *own])))
        return tuple(strips)

    @functools.cached_property
    def key_strips(self) -> tuple[Strip, ...]:
        """The transpose of `strips`: spans of keys with the query ranges that see them; covers every key once.

        A window may start inside a chunk, so spans break wherever any rectangle begins or ends.
        """
        edges = sorted({edge for r in self.rectangles for edge in (r.key_start, r.key_end)})
        strips = []
        for start, end in itertools.pairwise(edges):
            seen_by = [
                (r.query_start, r.query_end) for r in self.rectangles if r.key_start <= start and end <= r.key_end
            ]
            strips.append(Strip(start, end, merge_ranges(seen_by)))
        return tuple(strips)

    @functools.cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """Disjoint full rectangles whose union is the mask."""
        return tuple(Rectangle(s.start, s.end, *keys) for s in self.strips for keys in s.ranges)

    @property
    def area(self) -> int:
        """Visible (query, key) pairs."""
        return sum((r.query_end - r.query_start) * (r.key_end - r.key_start) for r in self.rectangles)

    @property
    def density(self) -> float:
        """Visible share of the square num_tokens x num_tokens, in (0, 1]."""
        return self.area / self.num_tokens**2

    def flops(self, *, batch: int, heads: int, head_dim: int, backward: bool = False) -> int:
        """Useful FLOPs: 2 matmuls over `area`; the backward alone has 5 (scores again, dP, dV, dK, dQ)."""
        return (10 if backward else 4) * batch * heads * head_dim * self.area

    def dense_mask(self, device: torch.device | str | None = None) -> Tensor:
        """Bool [num_tokens, num_tokens], True where the query (row) sees the key (column)."""
        mask = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool, device=device)
        for r in self.rectangles:
            mask[r.query_start : r.query_end, r.key_start : r.key_end] = True
        return mask

    def block_mask(
        self, device: torch.device | str = "cpu", *, block_size: int = 128, num_rows: int | None = None
    ) -> BlockMask:
        """FlexAttention BlockMask, built from the rectangles: the dense mask is never formed.

        Args:
            block_size: edge of a block in tokens, for queries and keys.
            num_rows: sequence length when the caller pads; rows past `num_tokens` see nothing and are not seen.
        Raises:
            ValueError: num_rows is smaller than num_tokens.
        """
        rows = self.num_tokens if num_rows is None else num_rows
        if rows < self.num_tokens:
            raise ValueError(f"num_rows must be at least {self.num_tokens}, got {num_rows}")
        return _block_mask(self, torch.device(device), block_size, rows)


def _block_mask(layout: BlockCausalLayout, device: torch.device, block_size: int, rows: int) -> BlockMask:
    """Count the visible pairs of every block; blocks that are full skip the mask function."""
    from torch.nn.attention.flex_attention import BlockMask

    num_blocks = -(-rows // block_size)
    low = torch.arange(num_blocks, dtype=torch.int64) * block_size

    def overlap(start: int, end: int) -> Tensor:  # [num_blocks] tokens of [start, end) in each block
        return (torch.clamp(low + block_size, max=end) - torch.clamp(low, min=start)).clamp(min=0)

    visible = torch.zeros(num_blocks, num_blocks, dtype=torch.int64)
    for r in layout.rectangles:
        visible += torch.outer(overlap(r.query_start, r.query_end), overlap(r.key_start, r.key_end))
    full = visible == block_size**2
    partial = (visible > 0) & ~full

    width = max(len(s.ranges) for s in layout.strips)
    bounds = torch.zeros(2 * width, rows, dtype=torch.int32)
    for strip in layout.strips:
        for i, (start, end) in enumerate(strip.ranges):
            bounds[2 * i, strip.start : strip.end] = start
            bounds[2 * i + 1, strip.start : strip.end] = end
    starts, ends = bounds[0::2].to(device).unbind(), bounds[1::2].to(device).unbind()

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key >= starts[0][query]) & (key < ends[0][query])
        for start, end in zip(starts[1:], ends[1:], strict=True):
            seen = seen | ((key >= start[query]) & (key < end[query]))
        return seen

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:  # counts [1, 1, rows], indices [1, 1, rows, columns]
        indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
        counts = blocks.sum(-1)
        return (
            counts[None, None].to(device=device, dtype=torch.int32),
            indices[None, None].to(device=device, dtype=torch.int32).contiguous(),
        )

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=(rows, rows)
    )


if __name__ == "__main__":
    from afd_kernels.layout_plot import main

    main()
