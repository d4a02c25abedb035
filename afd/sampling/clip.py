"""One finished clip: text encoding, rollout, decoding, encoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from afd.config import RunConfig
from afd.data.video import encode_video
from afd.models.encoders import encode_prompts, latent_shape, load_codec
from afd.models.image_encoder import condition_on
from afd.models.student import CausalStudent
from afd.rollout import rollout, rollout_noise, sampler_times


def sample_video(
    student: CausalStudent,
    config: RunConfig,
    prompt: str,
    out: Path,
    *,
    seed: int,
    scale: int = 1,
    images: Sequence[Image.Image] = (),
) -> None:
    """Generate one video and write it, on the student's device; each encoder is in memory only while it is needed.

    Args:
        student: bare module.
        config: the run's: sampler, encoders, video format.
        prompt: any sentence the text encoder can read.
        out: mp4 file.
        seed: of the rollout's noise.
        scale: enlargement for watching.
        images: the first frame to go on from, and maybe the last (see `afd.models.image_encoder.check_images`).
    Raises:
        ValueError: the text encoder does not know a word of the prompt.
    """
    device = next(student.parameters()).device
    embeds = encode_prompts(config.encoders, [prompt], device=device)
    times = sampler_times(config.rollout)
    noise = rollout_noise([(seed,)], times.num_noises, latent_shape(config.encoders, config.video)).to(device)
    codec, size = load_codec(config.encoders, device=device), (config.video.height, config.video.width)
    image, first = condition_on(
        images, student.shape, codec, config.encoders, size=size, num_latent_frames=noise.shape[3], device=device
    )
    video = codec.decode(rollout(student, embeds, noise, times, image=image, first_chunk=first))
    encode_video(video[0].cpu().numpy(), out, fps=config.video.fps, scale=scale)
