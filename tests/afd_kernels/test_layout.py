"""The layout: rectangles, dense mask, BlockMask and cache ranges describe the same thing, for every kind of layout."""

import itertools

import pytest
import torch

from afd_kernels import BlockCausalLayout
from afd_kernels.layout import merge_ranges
from afd_kernels.layout_plot import describe, main


def every_layout():
    axes = ((1, 5, 7), (1, 2, 3), (None, 2, 3, 4), (0, 1, 3), (None, 1), (False, True))
    for frames, chunk, window, sink, first, teacher in itertools.product(*axes):
        if window is not None and window < min(chunk, frames):
            continue
        yield BlockCausalLayout(frames, 3, chunk, window, sink, first, teacher)


LAYOUTS = list(every_layout())


def mask_by_definition(layout):
    """Every pair from the words of the definition, frame by frame."""
    chunk_of = [i for i, (start, end) in enumerate(layout.chunk_spans) for _ in range(start, end)]
    length = layout.num_frames
    frames = torch.zeros(*[layout.num_tokens // layout.tokens_per_frame] * 2, dtype=torch.bool)
    for query, key in itertools.product(range(length), repeat=2):
        end = layout.chunk_spans[chunk_of[query]][1]
        is_recent = layout.window_frames is None or key >= end - layout.window_frames
        is_seen = key < end and (is_recent or key < layout.sink_frames)
        frames[query, key] = is_seen
        if layout.teacher_forcing:
            is_own = chunk_of[query] == chunk_of[key]
            frames[length + query, key] = is_seen and not is_own
            frames[length + query, length + key] = is_own
    return frames.repeat_interleave(layout.tokens_per_frame, 0).repeat_interleave(layout.tokens_per_frame, 1)


def test_rectangles_are_disjoint_and_sum_to_the_mask_of_the_definition():
    for layout in LAYOUTS:
        expected = mask_by_definition(layout)
        counted = torch.zeros(expected.shape, dtype=torch.int32)
        for r in layout.rectangles:
            counted[r.query_start : r.query_end, r.key_start : r.key_end] += 1
        assert torch.equal(counted, expected.int()), layout
        assert torch.equal(layout.dense_mask(), expected), layout
        assert layout.area == expected.sum()
        assert layout.density == pytest.approx(expected.float().mean().item())


def test_every_token_sees_and_is_seen():
    for layout in LAYOUTS:
        mask = layout.dense_mask()
        assert mask.any(0).all()
        assert mask.diagonal().all()


def test_key_strips_are_the_transpose():
    for layout in LAYOUTS:
        mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
        covered = [(strip.start, strip.end) for strip in layout.key_strips]
        assert merge_ranges(covered) == ((0, layout.num_tokens),)
        assert sum(end - start for start, end in covered) == layout.num_tokens
        for strip in layout.key_strips:
            for start, end in strip.ranges:
                mask[start:end, strip.start : strip.end] = True
        assert torch.equal(mask, layout.dense_mask()), layout


def test_kernels_meet_at_most_three_key_ranges_and_two_query_ranges():
    assert max(len(strip.ranges) for layout in LAYOUTS for strip in layout.strips) == 3
    assert max(len(strip.ranges) for layout in LAYOUTS for strip in layout.key_strips) == 2


@pytest.mark.parametrize("num_rows", [None, 90])
def test_block_mask_equals_the_dense_mask(num_rows):
    for layout in LAYOUTS[:: len(LAYOUTS) // 12]:
        mask = layout.block_mask(block_size=4, num_rows=num_rows)
        rows = num_rows or layout.num_tokens
        query, key = torch.arange(rows)[:, None], torch.arange(rows)[None, :]
        zero = torch.zeros((), dtype=torch.int64)
        by_function = mask.mask_mod(zero, zero, query, key)
        expected = torch.zeros(rows, rows, dtype=torch.bool)
        expected[: layout.num_tokens, : layout.num_tokens] = layout.dense_mask()
        assert torch.equal(by_function, expected)
        blocks = torch.nn.functional.pad(expected, (0, -rows % 4, 0, -rows % 4)).unfold(0, 4, 4).unfold(1, 4, 4)
        assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(-1).any(-1))


def test_window_and_sink_keep_what_the_public_rolling_cache_keeps():
    """Its window W counts every kept frame: ours is W - S with S sink frames on top."""
    frames = 12
    for window, sink, chunk in ((4, 1, 1), (3, 0, 1), (6, 2, 2), (7, 1, 3)):
        layout = BlockCausalLayout(frames, 1, chunk, window_frames=window - sink, sink_frames=sink)
        cache: list[int] = []
        for index, (start, end) in enumerate(layout.chunk_spans):
            cache += range(start, end)
            while len(cache) > window:
                del cache[sink]
            seen = [frame for span in layout.visible_frames(index) for frame in range(*span)]
            assert seen == cache


def test_teacher_forcing_shows_a_noisy_chunk_what_the_cache_would():
    layout = BlockCausalLayout(7, 2, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True)
    noisy = layout.strips[layout.num_chunks :]
    for chunk, strip in enumerate(noisy):
        past = [(2 * start, 2 * end) for start, end in layout.past_frames(chunk)]
        assert strip.ranges == merge_ranges([*past, (strip.start, strip.end)])
    assert layout.past_frames(0) == ()
    assert layout.past_frames(3) == ((0, 1), (4, 5))
    assert layout.visible_frames(3) == ((0, 1), (4, 7))


def test_published_sizes():
    wan = BlockCausalLayout(21, 1560, 3)
    assert wan.num_tokens == 32760
    assert wan.chunk_spans == tuple((i, i + 3) for i in range(0, 21, 3))
    assert wan.flops(batch=1, heads=12, head_dim=128) == pytest.approx(3.77e12, rel=1e-3)
    assert wan.flops(batch=1, heads=12, head_dim=128, backward=True) == pytest.approx(9.42e12, rel=1e-3)
    teacher = BlockCausalLayout(21, 1560, 3, teacher_forcing=True)
    assert teacher.flops(batch=1, heads=12, head_dim=128) == pytest.approx(7.54e12, rel=1e-3)
    assert teacher.density == pytest.approx(0.286, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"tokens_per_frame": -1}, "tokens_per_frame must be at least 1, got -1"),
        ({"chunk_frames": 0}, "chunk_frames must be at least 1, got 0"),
        ({"sink_frames": -1}, "sink_frames must be at least 0, got -1"),
        ({"first_chunk_frames": 8}, r"first_chunk_frames must be in \[1, 7\], got 8"),
        ({"window_frames": 2}, r"window_frames must hold the longest chunk \(3 frames\).*got 2"),
    ],
)
def test_wrong_counts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BlockCausalLayout(**{"num_frames": 7, "tokens_per_frame": 2, "chunk_frames": 3, **options})


def test_wrong_chunk_and_rows_are_named():
    layout = BlockCausalLayout(3, 2, 1)
    with pytest.raises(ValueError, match=r"chunk must be in \[0, 3\), got 3"):
        layout.past_frames(3)
    with pytest.raises(ValueError, match="num_rows must be at least 6, got 5"):
        layout.block_mask(num_rows=5)


def test_plot_writes_a_picture_and_says_what_it_shows(tmp_path, capsys):
    path = tmp_path / "layout.png"
    main(
        [
            "--num_frames",
            "4",
            "--tokens_per_frame",
            "2",
            "--chunk_frames",
            "2",
            "--teacher_forcing",
            "--plot",
            str(path),
        ]
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "16 tokens (clean | noisy)" in printed
    assert describe(BlockCausalLayout(4, 2, 2, teacher_forcing=True)) in printed
