"""Clips to samples: codec and text encoder in batches, on a GPU if there is one. The only place teacher pixels become
latents, so that every teacher goes through the student's own codec.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from afd.config import RunConfig
from afd.data.schema import Reject, Sample
from afd.data.video import encode_video
from afd.device import checked_device
from afd.models.encoders import VideoCodec, load_codec, load_text_encoder
from afd.preparation.decoding import Clip, ClipFormat
from afd.teachers.base import SourceVideo


def codec_clip(codec: VideoCodec, latents: Tensor, *, fps: float, crf: int) -> bytes:
    """The H.264 file of one clip's latents [C, F, H, W]: the one path from latents to pixels for a discriminator.

    Teacher clips kept with `prepare.keep_video=codec` and a student's rollouts take it alike, so that neither the
    codec's nor the compression's traces tell them apart.
    """
    return encode_video(codec.decode(latents[None])[0].float().cpu().numpy(), fps=fps, crf=crf)


class ClipEncoder:
    """The configured codec and text encoder, loaded once."""

    def __init__(self, config: RunConfig, *, device: torch.device | None = None) -> None:
        """Load both networks onto the device (default: `prepare.device`, else a GPU if there is one).

        Raises:
            ValueError: there is no such device, or a network's folder is missing or incomplete.
        """
        self.device = device or checked_device(config.prepare.device, "prepare.device")
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        self._codec = load_codec(config.encoders, device=self.device)
        self._text = load_text_encoder(config.encoders, device=self.device)
        self._video, self._prepare = config.video, config.prepare

    @property
    def clip_format(self) -> ClipFormat:
        """What decoding must deliver."""
        return ClipFormat(
            num_frames=self._codec.num_pixel_frames(self._video.num_frames),
            height=self._video.height,
            width=self._video.width,
            fps=self._video.fps,
            max_bytes=int(self._prepare.max_video_mib * 2**20),
            keep=self._prepare.keep_video,
            crf=self._prepare.crf,
        )

    def encode(self, batch: Sequence[tuple[SourceVideo, Clip]]) -> list[Sample | Reject]:
        """One sample or reject for each pair, in order; pixels and words go through the networks as one batch each."""
        problems = [self._problem(video.prompt) for video, _ in batch]
        good = [pair for pair, problem in zip(batch, problems, strict=True) if problem is None]
        samples = iter(self._encode_good(good))
        return [
            next(samples)
            if problem is None
            else Reject(video.source_id, problem, "" if video.path is None else str(video.path))
            for (video, _), problem in zip(batch, problems, strict=True)
        ]

    def _encode_good(self, batch: Sequence[tuple[SourceVideo, Clip]]) -> list[Sample]:
        if not batch:
            return []
        prompts = [video.prompt for video, _ in batch]
        # On a CPU a batch is no faster, and one by one a prompt's embedding is the same in any company.
        parts = [prompts] if self.device.type != "cpu" else [[prompt] for prompt in prompts]
        embeds = torch.cat([self._text.encode(part).cpu() for part in parts])
        pixels = torch.from_numpy(np.stack([clip.frames for _, clip in batch])).to(self.device)
        latents = self._codec.encode(pixels)
        return [self._sample(video, clip, latents[row], embeds[row]) for row, (video, clip) in enumerate(batch)]

    def _problem(self, prompt: str) -> str | None:
        """Why the text encoder refuses a prompt; a refused one must not take its batch along."""
        try:
            self._text.tokenize([prompt])
        except ValueError as error:
            return str(error)
        return None

    def _sample(self, video: SourceVideo, clip: Clip, latents: Tensor, embeds: Tensor) -> Sample:
        kept = clip.mp4
        if self._prepare.keep_video == "codec":
            kept = codec_clip(self._codec, latents, fps=self._video.fps, crf=self._prepare.crf)
        return Sample(
            prompt=video.prompt,
            latents=latents,
            prompt_embeds=embeds,
            video_mp4=kept or None,
            source_id=video.source_id,
            teacher=video.teacher,
            seed=video.seed,
            fps=self._video.fps,
            sha256=clip.sha256,
            teacher_version=video.version,
            licence=video.licence,
            short_prompt=video.short_prompt,
            duration_s=clip.duration_s,
            motion=clip.motion,
            brightness=clip.brightness,
        )
