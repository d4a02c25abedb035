"""Keys and values of the frames already generated, for chunk-by-chunk rollouts.

One buffer, allocated once: `[sink | ring]`. The first frames of the video stay in the sink, all others go round the
ring, each new chunk over the oldest frames, which it may not see any more. Attention does not mind the order of its
keys (they are stored after RoPE), so it always reads one contiguous prefix: no mask, no concatenation, no shifting of
old frames, no host synchronisation (all bookkeeping is in Python integers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd_kernels import cached_attention


class KVCache:
    """Per-layer key/value buffers with a local window and sink frames.

    `window_frames` counts the frames a query may see, ending with the last frame of its own chunk; the first
    `sink_frames` frames of the video come on top.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        shape: tuple[int, int, int],
        tokens_per_frame: int,
        num_frames: int | None,
        window_frames: int | None = None,
        sink_frames: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate the buffers.

        Args:
            num_layers: transformer blocks.
            shape: (N, heads, head_dim).
            tokens_per_frame: H W / (patch height x patch width).
            num_frames: frames of the whole video; None for a video without end, which needs a window.
            window_frames: see the class; None keeps everything.
            sink_frames: see the class.
            device: of the buffers.
            dtype: of the buffers.
        Raises:
            ValueError: neither a length nor a window bounds the memory.
        """
        if num_frames is None and window_frames is None:
            raise ValueError("a video without end needs student.window_frames to bound the cache, got none")
        batch, heads, head_dim = shape
        bounds = [] if num_frames is None else [num_frames]
        bounds += [] if window_frames is None else [window_frames + sink_frames]
        self._capacity = min(bounds)
        self._tokens_per_frame = tokens_per_frame
        self._window_frames = window_frames
        self._sink_frames = sink_frames
        size = (num_layers, 2, batch, heads, self._capacity * tokens_per_frame, head_dim)
        self._buffer = torch.zeros(size, device=device, dtype=dtype)
        self._end = 0  # frames begun so far
        self._runs: list[tuple[slice, slice]] = []  # tokens of the current chunk, and where they are kept
        self._visible = 0  # tokens of the prefix that the current chunk sees

    @property
    def num_bytes(self) -> int:
        """Bytes held by the buffers."""
        return self._buffer.numel() * self._buffer.element_size()

    def begin_chunk(self, num_frames: int) -> None:
        """Make the previous chunk permanent and give the next one the slots of what it may not see any more.

        Raises:
            ValueError: the chunk does not fit in the window or in the video.
        """
        start, end, per = self._end, self._end + num_frames, self._tokens_per_frame
        if self._window_frames is not None and num_frames > self._window_frames:
            raise ValueError(f"a chunk of {num_frames} frames does not fit in a window of {self._window_frames}")
        if self._window_frames is None and end > self._capacity:
            raise ValueError(f"the cache holds {self._capacity} frames, got {start} + {num_frames}")
        self._runs = []
        for source, target, length in self._slots(start, end):
            self._runs.append(
                (slice(source * per, (source + length) * per), slice(target * per, (target + length) * per))
            )
        self._visible = min(end, self._capacity) * per
        self._end = end

    def _slots(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Runs (first frame within the chunk, slot, frames) of contiguous slots for the video's frames [start, end)."""
        sink, runs, frame = self._sink_frames, [], start
        while frame < end:
            if frame < sink:
                slot, room = frame, min(sink, self._capacity) - frame
            else:
                ring = self._capacity - sink
                slot = sink + (frame - sink) % ring
                room = self._capacity - slot
            length = min(room, end - frame)
            runs.append((frame - start, slot, length))
            frame += length
        return runs

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk's keys and values, return everything it may see, itself included.

        Args:
            layer: block index.
            k: [N, heads, K * tokens_per_frame, head_dim], after RoPE.
            v: same shape.
        Returns:
            keys and values [N, heads, visible tokens, head_dim], views of the buffer; once the ring is full their
            order is not the video's.
        """
        keys, values = self._buffer[layer, 0], self._buffer[layer, 1]
        for source, target in self._runs:
            keys[:, :, target] = k[:, :, source]
            values[:, :, target] = v[:, :, source]
        return keys[:, :, : self._visible], values[:, :, : self._visible]


class LayerCache:
    """One block's view of a cache: what its self-attention needs."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the current chunk's keys and values and attend to everything it may see; all [N, heads, tokens, D]."""
        keys, values = self.cache.put(self.layer, k, v)
        return cached_attention(q, keys, values)
