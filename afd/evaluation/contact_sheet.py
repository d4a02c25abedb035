"""Contact sheets: videos as rows, frames as columns, so that a person sees motion and blur on one still picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, FOREGROUND, MUTED = (250, 250, 247), (32, 36, 44), (120, 126, 138)
ROLE_COLOURS = {"teacher": (196, 124, 16), "base": (110, 122, 142), "student": (24, 108, 214)}
GAP, LABEL_WIDTH, HEADING_HEIGHT = 4, 84, 26


def contact_sheet(rows: Mapping[str, np.ndarray], path: Path, *, upscale: int = 3, max_columns: int = 16) -> Path:
    """Write a PNG with one row a video and one column a frame.

    Args:
        rows: label -> [F, H, W, 3] float in [0, 1] or uint8. A label is a role ("teacher", "base", "student") or
            "<role>: <caption>"; a caption that differs from the row above is written as a heading.
        path: the PNG to write; its folder is made if absent.
        upscale: whole factor of nearest-neighbour enlargement.
        max_columns: longer videos are thinned evenly, first and last frame kept.
    Returns:
        `path`.
    Raises:
        ValueError: no rows, a video is not [F, H, W, 3] or not finite, or upscale is not positive.
    """
    if not rows or upscale < 1 or max_columns < 2:
        got = f"{len(rows)}, {upscale} and {max_columns}"
        raise ValueError(f"rows, upscale and max_columns must be at least 1, 1 and 2, got {got}")
    strips = {label: _strip(label, video, upscale, max_columns) for label, video in rows.items()}
    captions = [label.partition(": ")[2] for label in strips]
    is_new = [bool(caption) and caption != above for caption, above in zip(captions, ["", *captions[:-1]], strict=True)]
    width = LABEL_WIDTH + max(strip.width for strip in strips.values()) + 2 * GAP
    height = sum(strip.height + GAP for strip in strips.values()) + HEADING_HEIGHT * sum(is_new) + 2 * GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font, y = ImageFont.load_default(13), GAP
    for (label, strip), has_heading in zip(strips.items(), is_new, strict=True):
        role, _, caption = label.partition(": ")
        if has_heading:
            draw.text((GAP + 2, y + HEADING_HEIGHT / 2), caption, FOREGROUND, font=font, anchor="lm")
            y += HEADING_HEIGHT
        colour = ROLE_COLOURS.get(role, MUTED)
        draw.rectangle((GAP, y, GAP + 3, y + strip.height - 1), fill=colour)
        draw.text((GAP + 12, y + strip.height / 2), role, colour, font=font, anchor="lm")
        sheet.paste(strip, (LABEL_WIDTH, y))
        y += strip.height + GAP
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def _strip(label: str, video: np.ndarray, upscale: int, max_columns: int) -> Image.Image:
    """Enlarge a video's frames and lay them side by side."""
    frames = np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"video {label!r} must be [F, H, W, 3], got {list(frames.shape)}")
    if frames.dtype != np.uint8:
        if not np.isfinite(frames).all():
            raise ValueError(f"video {label!r} must be finite")
        frames = (np.clip(frames, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    if len(frames) > max_columns:
        frames = frames[np.linspace(0, len(frames) - 1, max_columns).round().astype(int)]
    height, width = frames.shape[1] * upscale, frames.shape[2] * upscale
    strip = Image.new("RGB", (len(frames) * (width + GAP) - GAP, height), BACKGROUND)
    for i, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST), (i * (width + GAP), 0))
    return strip
