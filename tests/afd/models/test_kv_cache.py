"""What the cache keeps, evicts and refuses."""

import pytest
import torch
from torch import Tensor

from afd.models.kv_cache import KVCache
from afd_kernels import BlockCausalLayout

TOKENS = 2


def frame_numbers(start: int, end: int) -> Tensor:
    """Keys [1, 1, tokens, 1] that hold their frame's index."""
    return torch.arange(start, end).repeat_interleave(TOKENS).float().view(1, 1, -1, 1)


def seen_frames(cache: KVCache, start: int, end: int) -> list[int]:
    """Frames a chunk sees, from what `put` returns in each of two layers; the noisy pass leaves no trace."""
    cache.begin_chunk(end - start)
    for layer in range(2):
        cache.put(layer, torch.full_like(frame_numbers(start, end), -1), frame_numbers(start, end))
    seen = []
    for layer in range(2):
        keys, values = cache.put(layer, frame_numbers(start, end), -frame_numbers(start, end))
        assert torch.equal(keys, -values)
        assert torch.equal(keys[0, 0, ::TOKENS, 0], keys[0, 0, 1::TOKENS, 0])
        seen.append(sorted(keys[0, 0, ::TOKENS, 0].int().tolist()))
    assert seen[0] == seen[1]
    return seen[0]


def make_cache(num_frames: int | None, window: int | None, sink: int) -> KVCache:
    return KVCache(
        num_layers=2,
        shape=(1, 1, 1),
        tokens_per_frame=TOKENS,
        num_frames=num_frames,
        window_frames=window,
        sink_frames=sink,
    )


def test_eviction_by_hand() -> None:
    cache = make_cache(7, window=3, sink=1)
    assert [seen_frames(cache, f, f + 1) for f in range(6)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 2, 3, 4],
        [0, 3, 4, 5],
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (None, 2), (3, 0), (3, 1), (4, 3), (5, 2), (20, 1)])
@pytest.mark.parametrize("first", [None, 1])
def test_the_cache_shows_what_the_training_layout_shows(
    chunk: int, window: int | None, sink: int, first: int | None
) -> None:
    layout = BlockCausalLayout(
        num_frames=12 + (first or 0),
        tokens_per_frame=TOKENS,
        chunk_frames=chunk,
        window_frames=window,
        sink_frames=sink,
        first_chunk_frames=first,
    )
    cache = make_cache(layout.num_frames, window, sink)
    for index, (start, end) in enumerate(layout.chunk_spans):
        expected = [frame for begin, stop in layout.visible_frames(index) for frame in range(begin, stop)]
        assert seen_frames(cache, start, end) == expected


def test_memory_is_bounded_by_window_and_sink() -> None:
    per_frame = 2 * 2 * TOKENS * 4  # layers, keys and values, tokens, bytes of float32
    assert make_cache(100, window=3, sink=1).num_bytes == 4 * per_frame
    assert make_cache(100, window=None, sink=1).num_bytes == 100 * per_frame
    assert make_cache(2, window=3, sink=1).num_bytes == 2 * per_frame


def test_a_video_without_end_keeps_window_and_sink() -> None:
    cache = make_cache(None, window=4, sink=2)
    seen = [seen_frames(cache, start, start + 3) for start in range(0, 300, 3)]
    assert seen[-1] == [0, 1, 296, 297, 298, 299]
    assert cache.num_bytes == 6 * 2 * 2 * TOKENS * 4


def test_a_video_without_end_needs_a_window() -> None:
    with pytest.raises(ValueError, match=r"a video without end needs student\.window_frames to bound the cache"):
        make_cache(None, window=None, sink=2)


def test_a_chunk_must_fit_in_the_window() -> None:
    with pytest.raises(ValueError, match="a chunk of 4 frames does not fit in a window of 3"):
        make_cache(9, window=3, sink=0).begin_chunk(4)


def test_a_chunk_must_fit_in_the_video() -> None:
    cache = make_cache(5, window=None, sink=0)
    cache.begin_chunk(3)
    with pytest.raises(ValueError, match=r"the cache holds 5 frames, got 3 \+ 3"):
        cache.begin_chunk(3)
