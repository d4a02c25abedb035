"""One finished clip: text encoding, rollout, decoding, encoding."""

from __future__ import annotations

from pathlib import Path

from afd.config import RunConfig
from afd.data.video import encode_video
from afd.models.encoders import encode_prompts, latent_shape, load_codec
from afd.models.student import CausalStudent
from afd.rollout import rollout, rollout_noise, sampler_times


def sample_video(
    student: CausalStudent, config: RunConfig, prompt: str, out: Path, *, seed: int, scale: int = 1
) -> None:
    """Generate one video and write it, on the student's device; each encoder is in memory only while it is needed.

    Args:
        student: bare module.
        config: the run's: sampler, encoders, video format.
        prompt: any sentence the text encoder can read.
        out: mp4 file.
        seed: of the rollout's noise.
        scale: enlargement for watching.
    Raises:
        ValueError: the text encoder does not know a word of the prompt.
    """
    device = next(student.parameters()).device
    embeds = encode_prompts(config.encoders, [prompt], device=device)
    times = sampler_times(config.rollout)
    noise = rollout_noise([(seed,)], times.num_noises, latent_shape(config.encoders, config.video)).to(device)
    latents = rollout(student, embeds, noise, times)
    video = load_codec(config.encoders, device=device).decode(latents)
    encode_video(video[0].cpu().numpy(), out, fps=config.video.fps, scale=scale)
