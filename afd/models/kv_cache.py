"""Keys and values of the frames already generated, for chunk-by-chunk rollouts.

One buffer per layer, allocated once: `[kept frames | current chunk]`. The current chunk's slot is overwritten at every
denoising step and becomes permanent with the clean pass, so attention always reads one contiguous prefix: no mask, no
concatenation, no host synchronisation (all bookkeeping is in Python integers).
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per-layer key/value buffers with a local window and sink frames.

    `window_frames` counts the frames a query may see, ending with the last frame of its own chunk; the first
    `sink_frames` frames of the video come on top. Keys are stored after RoPE.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        shape: tuple[int, int, int],
        tokens_per_frame: int,
        num_frames: int,
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
            num_frames: frames of the whole video; only the window and the sink are kept when `window_frames` is set.
            window_frames: see the class; None keeps everything.
            sink_frames: see the class.
            device: of the buffers.
            dtype: of the buffers.
        """
        batch, heads, head_dim = shape
        capacity = num_frames if window_frames is None else min(num_frames, window_frames + sink_frames)
        self._tokens_per_frame = tokens_per_frame
        self._window_frames = window_frames
        self._sink_frames = sink_frames
        self._capacity = capacity
        size = (num_layers, 2, batch, heads, capacity * tokens_per_frame, head_dim)
        self._buffer = torch.zeros(size, device=device, dtype=dtype)
        self._kept = 0  # frames before the current chunk's slot
        self._current = 0  # frames of the current chunk

    @property
    def num_bytes(self) -> int:
        """Bytes held by the buffers."""
        return self._buffer.numel() * self._buffer.element_size()

    def begin_chunk(self, num_frames: int) -> None:
        """Make the previous chunk permanent, evict what the next one may not see, open a slot of `num_frames`.

        Raises:
            ValueError: the chunk does not fit in the window or in the video.
        """
        if self._window_frames is not None and num_frames > self._window_frames:
            raise ValueError(f"a chunk of {num_frames} frames does not fit in a window of {self._window_frames}")
        self._kept += self._current
        if self._window_frames is not None:
            sink = min(self._sink_frames, self._kept)
            recent = min(self._window_frames - num_frames, self._kept - sink)
            if sink + recent < self._kept:
                start, end, per = self._kept - recent, self._kept, self._tokens_per_frame
                tail = self._buffer[..., start * per : end * per, :].clone()
                self._buffer[..., sink * per : (sink + recent) * per, :] = tail
                self._kept = sink + recent
        if self._kept + num_frames > self._capacity:
            raise ValueError(f"the cache holds {self._capacity} frames, got {self._kept} + {num_frames}")
        self._current = num_frames

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk's keys and values, return everything it may see, itself included.

        Args:
            layer: block index.
            k: [N, heads, K * tokens_per_frame, head_dim], after RoPE.
            v: same shape.
        Returns:
            keys and values [N, heads, visible tokens, head_dim], views of the buffer.
        """
        start = self._kept * self._tokens_per_frame
        end = start + self._current * self._tokens_per_frame
        self._buffer[layer, 0, :, :, start:end] = k
        self._buffer[layer, 1, :, :, start:end] = v
        return self._buffer[layer, 0, :, :, :end], self._buffer[layer, 1, :, :, :end]
