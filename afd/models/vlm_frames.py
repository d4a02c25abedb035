"""A clip as Qwen2-VL's vision tower reads it: which frames, which size, which patches. torch only, no torchvision.

Sizes and patch order follow transformers' processors, the choice of frames VideoAlign's; the tests compare with both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of both families; Source: their preprocessor_config.json
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MIN_FRAMES = 4
_MAX_FRAMES = 768
_MAX_ASPECT = 200


def frame_indices(
    num_video_frames: int, *, video_fps: float, fps: float, num_frames: int | None, multiple: int
) -> tuple[int, ...]:
    """Frames of a clip that are shown, evenly spaced from its first to its last.

    Their number is the clip's duration times fps, at least 4, rounded to a multiple of the temporal patch.

    Args:
        num_video_frames: of the clip.
        video_fps: its frames per second.
        fps: frames to show per second of video.
        num_frames: frames to show, in place of fps.
        multiple: frames per temporal patch.
    Raises:
        ValueError: the clip is shorter than what is asked for, or than one patch.
    Source: VideoAlign vision_process.py (the rule).
    """
    if num_frames is None:
        most = min(_MAX_FRAMES, num_video_frames) // multiple * multiple
        least = math.ceil(_MIN_FRAMES / multiple) * multiple
        wanted = min(max(num_video_frames / video_fps * fps, least), most)
    else:
        wanted = num_frames
    count = round(wanted / multiple) * multiple
    if not multiple <= count <= num_video_frames:
        raise ValueError(
            f"discriminator.vlm must show a multiple of {multiple} frames, at least {multiple} and at most the clip's "
            f"{num_video_frames}, got {count} (num_frames {num_frames}, fps {fps})"
        )
    return tuple(torch.linspace(0, num_video_frames - 1, count).round().long().tolist())


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that frames are resized to: sides divisible by factor, area within bounds, aspect kept about.

    Args:
        height, width: of the video.
        factor: pixels of a merged patch's side.
        min_pixels, max_pixels: bounds of the area.
    Raises:
        ValueError: one side is more than 200 times the other.
    Source: transformers models/qwen2_vl (the rule).
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(f"video sides must be within a factor of {_MAX_ASPECT}, got {height} x {width}")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as PIL's antialiased bicubic does: [N, T, height, width, 3] in [0, 1] -> [N, 3, T, *size], clamped."""
    n, t = frames.shape[:2]
    images = frames.flatten(0, 1).permute(0, 3, 1, 2).float()  # [N T, 3, height, width]
    if images.shape[2:] != size:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images.unflatten(0, (n, t)).transpose(1, 2).contiguous()


def patchify(clips: Tensor, *, patch: int, temporal: int, merge: int) -> Tensor:
    """Normalised patches in the vision tower's order.

    Args:
        clips: [N, 3, T, height, width] in [0, 1] (noise may leave it); T divisible by temporal, sides by patch * merge.
        patch: pixels of a patch's side.
        temporal: frames of a patch.
        merge: patches of a merged patch's side; the merge * merge patches of one are consecutive.
    Returns:
        [N * T / temporal * height / patch * width / patch, 3 * temporal * patch * patch].
    Raises:
        ValueError: the sizes do not divide.
    """
    n, channels, frames, height, width = clips.shape
    if channels != 3 or frames % temporal or height % (patch * merge) or width % (patch * merge):
        raise ValueError(
            f"clips must be [N, 3, T, height, width] with T divisible by {temporal} and sides by {patch * merge}, "
            f"got {list(clips.shape)}"
        )
    mean, std = (clips.new_tensor(each).view(1, 3, 1, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
    rows, columns = height // patch // merge, width // patch // merge
    x = ((clips - mean) / std).view(
        n, 3, frames // temporal, temporal, rows, merge, patch, columns, merge, patch
    )  # [N, 3, t, tau, R, m, p, C, m', p']
    x = x.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9)  # [N, t, R, C, m, m', 3, tau, p, p']
    return x.reshape(-1, 3 * temporal * patch * patch)
