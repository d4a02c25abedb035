"""Everything the study measures of one student on one set of prompts of a world, in one look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from study_scores import LONG
from torch import Tensor

from afd.config import RunConfig
from afd.data.loader import read_all, to_batch
from afd.distributed import World
from afd.evaluation.counting import measure_counts
from afd.evaluation.frechet import frechet_of_features, video_features
from afd.evaluation.heldout import HeldoutEvaluator, measure_clip
from afd.evaluation.motion import measure_motion
from afd.evaluation.physics import summarise
from afd.models.encoders import load_codec
from afd.models.student import CausalStudent
from afd.rollout import rollout, rollout_noise, sampler_times

_LONG_STREAM = 103
_LONGER = 3  # roll-outs this many times as long show what errors do when they feed on themselves
_SHOWN = 3


@dataclass(frozen=True)
class Measurement:
    """What one student, or the teacher, does on a set of prompts.

    Attributes:
        values: means by metric; undefined ones are missing.
        features: [N, 32], of the Frechet distance.
        clips: [P, F, H, W, 3] uint8, the first prompts'.
        prompts: P, theirs.
    """

    values: dict[str, float]
    features: Tensor
    clips: np.ndarray
    prompts: tuple[str, ...]

    def save_clips(self, path: Path) -> None:
        """Write the clips for the contact sheets."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, clips=self.clips, prompts=np.array(self.prompts))


def _evaluator(config: RunConfig, shards: Path, device: str) -> HeldoutEvaluator:
    torch.set_num_threads(1)
    place = torch.device(device)
    batch = to_batch(read_all(shards)).to(place)
    return HeldoutEvaluator(batch, load_codec(config.encoders, device=place), config, World(0, 0, 1, place))


def _measured(videos: np.ndarray, prompts: list[str], config: RunConfig) -> dict[str, float]:
    """Means over clips of everything that is measured clip by clip."""
    background, rows = config.teacher.physics.background, []
    for video, prompt in zip(videos, prompts, strict=True):
        row = measure_clip(video, prompt, config)
        motion = {"motion_change": measure_motion(video)["motion_change"]}
        rows.append({**row, **motion, **measure_counts(video, prompt, background=background)})
    return {name: each["mean"] for name, each in summarise(rows).items() if each["mean"] == each["mean"]}


def measure_teacher(config: RunConfig, shards: Path, *, device: str) -> Measurement:
    """The teacher's own videos of a set of prompts, through the student's codec."""
    evaluator = _evaluator(config, shards, device)
    videos = evaluator.decode(evaluator.batch.latents)
    prompts = list(evaluator.batch.prompts)
    return Measurement(_measured(videos, prompts, config), video_features(videos), *_shown(videos, prompts))


def measure_student(
    student: CausalStudent, config: RunConfig, shards: Path, teacher: Measurement, *, seeds: int, long_prompts: int,
    device: str,
) -> Measurement:  # fmt: skip
    """A student on a set of prompts: every model sees the same noise.

    Args:
        student: whole weights.
        config: its sampler, video format and world.
        shards: of the prompts, with the teacher's videos.
        teacher: of the same world, for the Frechet distance.
        seeds: clips per prompt.
        long_prompts: prompts of which a clip of three times the length is made as well; its metrics are `long/...`;
            may be 0.
        device: where the student samples.
    """
    evaluator = _evaluator(config, shards, device)
    student = student.to(torch.device(device)).eval()
    batch = evaluator.batch
    rows = [(row, seed) for seed in range(seeds) for row in range(len(batch.prompts))]
    videos = evaluator.decode(evaluator.sample(student, rows))
    prompts = [batch.prompts[row] for row, _ in rows]
    values, features = _measured(videos, prompts, config), video_features(videos)
    values["frechet"] = frechet_of_features(features, teacher.features)
    few = min(long_prompts, len(batch.prompts))
    if few:
        longer = _measured(_long_videos(student, evaluator, few), list(batch.prompts[:few]), config)
        values |= {f"long/{name}": longer[name] for name in LONG if name in longer}
    return Measurement(values, features, *_shown(videos, prompts))


def _long_videos(student: CausalStudent, evaluator: HeldoutEvaluator, count: int) -> np.ndarray:
    """Videos [count, 3 F, H, W, 3] of the first held-out prompts."""
    batch, times = evaluator.batch, sampler_times(evaluator.config.rollout)
    channels, frames, height, width = batch.latents.shape[1:]
    keys = [(_LONG_STREAM, int(each)) for each in batch.sample_ids[:count]]
    noise = rollout_noise(keys, times.num_noises, (channels, _LONGER * frames, height, width)).to(batch.latents)
    return evaluator.decode(rollout(student, batch.prompt_embeds[:count], noise, times))


def _shown(videos: np.ndarray, prompts: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    return (np.clip(videos[:_SHOWN], 0, 1) * 255 + 0.5).astype(np.uint8), tuple(prompts[:_SHOWN])
