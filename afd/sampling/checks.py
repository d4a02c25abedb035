"""What must fit together before a video is sampled; reads config files only."""

from __future__ import annotations

from afd.config import RunConfig, StudentShape
from afd.models.encoders import check_encoders, latent_shape
from afd.rollout import chunk_spans, sampler_times


def check_sampling(config: RunConfig, shape: StudentShape, *, is_stream: bool) -> None:
    """Encoders, resolution, frames and sampler fit the student; nothing is loaded or allocated.

    Args:
        config: the run's: encoders, video format, sampler.
        shape: the student's.
        is_stream: a stream's length is its own, a clip has `video.num_frames`.
    Raises:
        ValueError: the first thing that is missing or does not fit.
    """
    if shape.in_channels != shape.out_channels:
        raise ValueError(
            f"sampling needs a text-to-video student, in_channels = out_channels, got {shape.in_channels} and "
            f"{shape.out_channels}"
        )
    check_encoders(config.encoders, shape)
    _, num_frames, height, width = latent_shape(config.encoders, config.video)
    if height % shape.patch_size[1] or width % shape.patch_size[2]:
        raise ValueError(
            f"video.height and video.width must give latents divisible by the student's patch "
            f"{list(shape.patch_size[1:])}, got latents {height} x {width}"
        )
    if not is_stream:
        chunk_spans(shape, num_frames)
    sampler_times(config.rollout)
