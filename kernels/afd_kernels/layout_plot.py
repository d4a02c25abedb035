"""A picture of who sees whom: `python -m afd_kernels.layout --plot layout.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from afd_kernels.layout import BlockCausalLayout


def describe(layout: BlockCausalLayout) -> str:
    """Chunks, rectangles and useful work in words."""
    sizes = [end - start for start, end in layout.chunk_spans]
    flops = layout.flops(batch=1, heads=1, head_dim=128)
    return (
        f"{layout.num_frames} frames x {layout.tokens_per_frame} tokens, chunks of {sizes} frames, "
        f"{layout.num_tokens} tokens{' (clean | noisy)' if layout.teacher_forcing else ''}\n"
        f"{len(layout.rectangles)} rectangles, {layout.area:.4g} pairs, {layout.density:.1%} of the square, "
        f"{flops / 1e12:.3g} TFLOP forward per head of 128"
    )


def plot_layout(layout: BlockCausalLayout, path: Path) -> None:
    """Draw the rectangles with frames on both axes and chunk borders as lines.

    Args:
        path: image file to write; the suffix chooses the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle as Patch

    figure, axes = plt.subplots(figsize=(7, 7.4), layout="constrained")
    scale = layout.tokens_per_frame
    for r in layout.rectangles:
        is_noisy_key = r.key_start >= layout.video_tokens
        size = ((r.key_end - r.key_start) / scale, (r.query_end - r.query_start) / scale)
        color = "tab:orange" if is_noisy_key else "tab:blue"
        axes.add_patch(Patch((r.key_start / scale, r.query_start / scale), *size, color=color, alpha=0.8, linewidth=0))
    frames = layout.num_tokens // scale
    for border in (0, *(strip.end // scale for strip in layout.strips)):
        is_middle = layout.teacher_forcing and border == layout.num_frames
        for line in (axes.axhline, axes.axvline):
            line(border, color="black", linewidth=1.6 if is_middle else 0.3)
    axes.set(xlim=(0, frames), ylim=(frames, 0), aspect="equal")
    axes.set_xlabel("key frame" + (" (clean | noisy)" if layout.teacher_forcing else ""))
    axes.set_ylabel("query frame")
    axes.set_title(describe(layout), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print what a layout is and, with --plot, draw it; defaults are Wan-1.3B in chunks of three frames."""
    parser = argparse.ArgumentParser(prog="python -m afd_kernels.layout", description=__doc__)
    parser.add_argument("--num_frames", type=int, default=21)
    parser.add_argument("--tokens_per_frame", type=int, default=1560)
    parser.add_argument("--chunk_frames", type=int, default=3)
    parser.add_argument("--window_frames", type=int)
    parser.add_argument("--sink_frames", type=int, default=0)
    parser.add_argument("--first_chunk_frames", type=int)
    parser.add_argument("--teacher_forcing", action="store_true")
    parser.add_argument("--plot", type=Path, nargs="?", const=Path("layout.png"), help="image to write")
    options = vars(parser.parse_args(arguments))
    path = options.pop("plot")
    layout = BlockCausalLayout(**options)
    lines = [describe(layout)]
    if path is not None:
        plot_layout(layout, path)
        lines.append(f"wrote {path}")
    print("\n".join(lines))  # noqa: T201
