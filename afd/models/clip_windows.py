"""Several windows of a long video scored by one discriminator: where they lie, and the mean of their scores.

A window's frames are numbered from 0, so a discriminator judges a stretch of video wherever it lies, and its cost is
that of the windows, not of the video.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def even_starts(num_frames: int, clip_frames: int, num_clips: int) -> list[int]:
    """First frames of windows spread evenly from the video's start to its end; one window lies in the middle.

    Args:
        num_frames: F.
        clip_frames: frames of a window; <= F.
        num_clips: windows; the last of several ends with the video.
    """
    last = num_frames - clip_frames
    if num_clips == 1:
        return [last // 2]
    return [round(index * last / (num_clips - 1)) for index in range(num_clips)]


def random_starts(num_frames: int, clip_frames: int, num_clips: int, generators: list[torch.Generator]) -> Tensor:
    """First frames of each row's windows: one drawn from each of num_clips equal strata of all possible places.

    Stratified, so that windows spread over the video and each place is as likely as any other.

    Args:
        num_frames, clip_frames, num_clips: as for `even_starts`.
        generators: one per row.
    Returns:
        [N, num_clips] int64 on the CPU, in ascending order.
    """
    places = num_frames - clip_frames + 1
    inside = torch.stack([torch.rand(num_clips, generator=each, dtype=torch.float64) for each in generators])
    return ((torch.arange(num_clips) + inside) / num_clips * places).long().clamp(max=places - 1)


class ClipWindows(nn.Module):
    """D over windows: the mean score of a video's windows, all in one pass.

    Args:
        scorer: maps (clips [M, C, K, H, W], prompt embeddings [M, L, D]) to scores [M].
        clip_frames: frames K of a window; a video of at most K frames is scored whole.
        num_clips: windows per video.
    """

    def __init__(self, scorer: nn.Module, *, clip_frames: int, num_clips: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.clip_frames, self.num_clips = clip_frames, num_clips

    def draw_starts(self, num_frames: int, generators: list[torch.Generator]) -> Tensor | None:
        """Random windows [N, num_clips] for training, or None where the whole video is scored."""
        if num_frames <= self.clip_frames:
            return None
        return random_starts(num_frames, self.clip_frames, self.num_clips, generators)

    def forward(self, latents: Tensor, prompt_embeds: Tensor, starts: Tensor | None = None) -> Tensor:
        """Score videos.

        Args:
            latents: [N, C, F, H, W].
            prompt_embeds: [N, L, D].
            starts: [N, num_clips] first frames of each row's windows; by default the same evenly spaced ones for all.
        Returns:
            scores [N]: the mean over a row's windows.
        """
        num_frames, length = latents.shape[2], self.clip_frames
        if num_frames <= length:
            return self.scorer(latents, prompt_embeds)
        if starts is None:
            even = even_starts(num_frames, length, self.num_clips)
            windows = torch.stack([latents[:, :, start : start + length] for start in even], dim=1)
        else:
            frames = starts.to(latents.device)[:, :, None] + torch.arange(length, device=latents.device)
            rows = torch.arange(len(latents), device=latents.device)[:, None, None]
            windows = latents.transpose(1, 2)[rows, frames].transpose(2, 3)  # [N, num_clips, C, K, H, W]
        count = windows.shape[1]
        scores = self.scorer(windows.flatten(0, 1), prompt_embeds.repeat_interleave(count, dim=0))
        return scores.unflatten(0, (-1, count)).mean(dim=1)


def draw_windows(module: nn.Module, clips: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, ...]:
    """What a discriminator is called with beside clips and condition in training: its random windows, or nothing."""
    starts = module.draw_starts(clips.shape[2], generators) if isinstance(module, ClipWindows) else None
    return () if starts is None else (starts,)
