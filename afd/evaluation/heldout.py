"""Measures a student on held-out prompts: same prompts and seeds for every model, work shared among the ranks."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.config import RunConfig
from afd.distributed import World, gather_objects
from afd.evaluation.motion import measure_motion
from afd.evaluation.physics import measure, summarise
from afd.models.encoders import VideoCodec
from afd.models.student import CausalStudent
from afd.rollout import rollout, rollout_noise, sampler_times
from afd.teachers.physics_scene import parse_prompt
from afd.types import VideoBatch

logger = logging.getLogger(__name__)
_EVALUATION_STREAM = 101
_BATCH = 32
_SMALL_CACHE = 256 * 2**20  # bytes of keys and values of _BATCH clips that do not matter; the built-in world: 12 MiB

Summary = dict[str, dict[str, float]]


def measure_clip(clip: np.ndarray, prompt: str, config: RunConfig) -> dict[str, float]:
    """The physics metrics of a clip [F, height, width, 3] in [0, 1], the truth being the run's built-in world."""
    world = config.teacher.physics
    return measure(
        clip,
        prompt,
        fps=config.video.fps,
        gravity=world.gravity,
        restitution=world.restitution,
        background=world.background,
    )


def without_nan(tree: Any) -> Any:
    """JSON has no NaN: undefined numbers in nested mappings become null."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and tree != tree else tree


@dataclass(frozen=True)
class HeldoutEvaluator:
    """Held-out prompts with their teacher videos, the codec, and the world whose truth is known.

    Attributes:
        batch: all held-out prompts; the teacher's videos are the reference row.
        codec: decodes latents to pixels.
        config: the run's; reads rollout, video, teacher and evaluation.
        world: ranks among which the clips are divided.
        rollout_batch: clips that a training rollout generates together; None takes `rollout.batch_size`, or 1.
    """

    batch: VideoBatch
    codec: VideoCodec
    config: RunConfig
    world: World
    rollout_batch: int | None = None

    def sample(self, student: CausalStudent, rows: list[tuple[int, int]]) -> Tensor:
        """Latents [len(rows), C, F, H, W] of (prompt row, seed) pairs; seeds are shared by all models."""
        times = sampler_times(self.config.rollout)
        parts = []
        batch_size = self._clips_together(student)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            keys = [(_EVALUATION_STREAM, int(self.batch.sample_ids[row]), seed) for row, seed in part]
            noise = rollout_noise(keys, times.num_noises, self.batch.latents.shape[1:]).to(self.batch.latents)
            embeds = self.batch.prompt_embeds[[row for row, _ in part]]
            parts.append(rollout(student, embeds, noise, times))
        return torch.cat(parts)

    def _clips_together(self, student: CausalStudent) -> int:
        """32 where their keys and values are small; else no more than a training rollout, whose memory was planned."""
        frames, height, width = self.batch.latents.shape[2:]
        cache = student.new_cache(_BATCH, frames, (height, width), device=torch.device("meta"))
        if cache.num_bytes <= _SMALL_CACHE:
            return _BATCH
        return min(_BATCH, self.rollout_batch or self.config.rollout.batch_size or 1)

    def evaluate(self, student: CausalStudent) -> Summary:
        """Metrics of a student over held-out prompts x seeds, the same on every rank."""
        seeds = self.config.evaluation.seeds_per_prompt
        rows = [(row, seed) for row in range(len(self.batch.prompts)) for seed in range(seeds)]
        mine = rows[self.world.rank :: self.world.size]
        measured = self._measure(self.sample(student, mine), [row for row, _ in mine]) if mine else []
        return self._summarise(measured, rows)

    def evaluate_teacher(self) -> Summary:
        """The same metrics of the teacher's own videos, through the same codec."""
        rows = [(row, 0) for row in range(len(self.batch.prompts))]
        mine = [row for row, _ in rows][self.world.rank :: self.world.size]
        return self._summarise(self._measure(self.batch.latents[mine], mine) if mine else [], rows)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pixels [N, F, height, width, 3] float32 in [0, 1], decoded clip by clip: pixels are large."""
        return np.concatenate([self.codec.decode(clip).cpu().numpy() for clip in latents.split(1)])

    def _measure(self, latents: Tensor, prompt_rows: list[int]) -> list[dict[str, float]]:
        clips = self.decode(latents)
        if not self._is_physics_world:
            return [measure_motion(clip) for clip in clips]
        pairs = zip(clips, prompt_rows, strict=True)
        return [measure_clip(clip, self.batch.prompts[row], self.config) for clip, row in pairs]

    @functools.cached_property
    def _is_physics_world(self) -> bool:
        """Whether every prompt is a sentence of the built-in world, whose truth is known; else motion is measured."""
        try:
            for prompt in self.batch.prompts:
                parse_prompt(prompt)
        except ValueError as error:
            if self.world.is_main:
                logger.info(
                    "held-out prompts are not the built-in world's, so motion is measured, not physics: %s", error
                )
            return False
        return True

    def _summarise(self, measured: list[dict[str, float]], rows: list[tuple[int, int]]) -> Summary:
        """Put the ranks' shares back in the order of `rows`, so that sums do not depend on the number of ranks."""
        shares = gather_objects(measured)
        return summarise([shares[i % len(shares)][i // len(shares)] for i in range(len(rows))])
