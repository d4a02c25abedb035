"""The axis legend and the records that pass between the stages of one step.

Axes, used by every docstring:
    B prompts, G rollouts per prompt, N = B * G samples, C latent channels, F latent frames, H W latent height and
    width, K frames per autoregressive chunk, L text tokens, D text width.

Latents are `[B, C, F, H, W]`. Time `t` lies in [0, 1]: 0 is clean, 1 is noise. `x_t = (1 - t) x0 + t eps` and the
velocity is `v = eps - x0`. Foreign layouts are converted at the border only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoBatch:
    """Teacher videos of B prompts as the loader delivers them.

    Attributes:
        sample_ids: [B] int64, stable index of each sample in its dataset; seeds every random choice made for it.
        prompts: B strings.
        latents: [B, C, F, H, W] float32, normalised by the codec.
        prompt_embeds: [B, L, D] float32, zero-padded to L.
        repeats: B counts of the same sample earlier in the global batch, which an epoch may end in; empty for all 0.
    """

    sample_ids: Tensor
    prompts: tuple[str, ...]
    latents: Tensor
    prompt_embeds: Tensor
    repeats: tuple[int, ...] = ()

    def seed_keys(self, group_size: int) -> list[tuple[int, ...]]:
        """What seeds each of the N rollouts: (sample id, g), and the repeat where it is not the sample's first."""
        ids = self.sample_ids.tolist()
        rows = list(zip(ids, self.repeats or [0] * len(ids), strict=True))
        return [(i, g, *([repeat] if repeat else [])) for i, repeat in rows for g in range(group_size)]

    def to(self, device: torch.device) -> VideoBatch:
        """The same batch with what a model reads on a device; ids stay where they are."""
        return replace(self, latents=self.latents.to(device), prompt_embeds=self.prompt_embeds.to(device))


@dataclass(frozen=True)
class Rollout:
    """Student samples on a batch's prompts: row `b * G + g` is rollout g of prompt b.

    Attributes:
        latents: [N, C, F, H, W] float32, no gradient.
        prompt_embeds: [N, L, D] float32.
        group_ids: [N] int64, index of the prompt in the global batch.
        sample_ids: [N] int64, the prompt's dataset index.
        noise: [N, C, F, H, W], what each chunk's last denoising step started from; None where nobody needs it.
    """

    latents: Tensor
    prompt_embeds: Tensor
    group_ids: Tensor
    sample_ids: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class NoisedStates:
    """The forward process applied to clean videos in the teacher-forcing layout.

    Attributes:
        x_t: [N, C, F, H, W], noised videos.
        v_target: [N, C, F, H, W], eps - x0.
        t: [N, F] in [0, 1], constant within a chunk.
        clean: [N, C, F, H, W], the context of later chunks: the videos themselves, noised to `context_noise`.
        context_noise: time of `clean`.
    """

    x_t: Tensor
    v_target: Tensor
    t: Tensor
    clean: Tensor
    context_noise: float = 0.0
