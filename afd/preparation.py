"""Teacher videos to shards: query, decode, encode, write. What `afd prepare` and the quick start's first minute do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from afd.config import RunConfig
from afd.data.schema import Reject, Sample, settings_fingerprint
from afd.data.video import decode_video
from afd.data.writer import ShardSummary, shards_match, write_shards
from afd.models.encoders import load_codec, load_text_encoder
from afd.teachers.base import Teacher
from afd.teachers.physics import PhysicsTeacher, heldout_prompts, training_prompts


def shard_folders(config: RunConfig) -> tuple[Path, Path]:
    """Training and held-out shard folders of a run, defaults filled in."""
    data = config.output_dir / "data"
    return config.data.train_shards or data / "train", config.data.heldout_shards or data / "heldout"


def prepare_shards(config: RunConfig, *, overwrite: bool = False) -> dict[str, ShardSummary]:
    """Query the built-in teacher for both splits and write their shards; folders that already match are kept.

    Returns:
        The summaries of what was written, by split; empty when everything was there.
    Raises:
        ValueError: a folder holds other shards and overwrite is False, or the teacher is not queryable.
        OSError: the disk is too full.
    """
    if config.teacher.kind != "physics":
        raise ValueError(f"teacher.kind must be physics to query it, got {config.teacher.kind!r}")
    train, heldout = shard_folders(config)
    prompts = {
        "train": (train, training_prompts(config.teacher.num_prompts)),
        "heldout": (heldout, heldout_prompts(config.teacher.num_heldout_prompts)),
    }
    teacher = PhysicsTeacher(config.teacher.physics)
    written: dict[str, ShardSummary] = {}
    for split, (folder, split_prompts) in prompts.items():
        settings = _settings(config, split)
        if shards_match(folder, settings_fingerprint(settings)):
            continue
        samples = _samples(config, teacher, split_prompts, split)
        written[split] = write_shards(samples, folder, metadata=settings, overwrite=overwrite)
    return written


def _settings(config: RunConfig, split: str) -> dict[str, object]:
    """Everything that decides the content of a split's shards; equal settings mean equal shards."""
    return {
        "split": split,
        "teacher": config.teacher.model_dump(mode="json"),
        "video": config.video.model_dump(mode="json"),
        "encoders": config.encoders.model_dump(mode="json"),
    }


def _samples(config: RunConfig, teacher: Teacher, prompts: Sequence[str], split: str) -> Iterator[Sample | Reject]:
    """One encoded teacher video per prompt; a video that cannot be used becomes a reject with its reason."""
    codec, text, video = load_codec(config.encoders), load_text_encoder(config.encoders), config.video
    progress = tqdm(prompts, desc=f"teacher videos ({split})", unit="video", disable=None)
    for number, prompt in enumerate(progress):
        finished = teacher.generate(prompt, number)
        try:
            frames = decode_video(
                finished.mp4,
                num_frames=codec.num_pixel_frames(video.num_frames),
                height=video.height,
                width=video.width,
                fps=video.fps,
                name=finished.source_id,
            )
        except ValueError as error:
            yield Reject(finished.source_id, str(error))
            continue
        yield Sample(
            prompt=prompt,
            latents=codec.encode(torch.from_numpy(frames)[None])[0],
            prompt_embeds=text.encode([prompt])[0],
            video_mp4=finished.mp4,
            source_id=finished.source_id,
            teacher=config.teacher.kind,
            seed=finished.seed,
            fps=video.fps,
        )
