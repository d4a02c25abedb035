"""What must fit together before a video is sampled; reads config files only."""

from __future__ import annotations

from afd.config import RunConfig, StudentShape
from afd.models.encoders import check_encoders, latent_shape
from afd.models.image_encoder import check_images
from afd.rollout import chunk_spans, sampler_times


def check_sampling(config: RunConfig, shape: StudentShape, *, is_stream: bool, num_images: int = 0) -> None:
    """Encoders, resolution, frames and sampler fit the student; nothing is loaded or allocated.

    Args:
        config: the run's: encoders, video format, sampler.
        shape: the student's.
        is_stream: a stream's length is its own, a clip has `video.num_frames`.
        num_images: given: none, the first frame, or the first and the last.
    Raises:
        ValueError: the first thing that is missing or does not fit.
    """
    check_images(config.encoders, shape, num_images)
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
