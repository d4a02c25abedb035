"""The study's data: each world's teacher videos as shards, and training prompts split for the search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from study_rows import WORLDS, Preset

from afd.config_file import load_config
from afd.data.loader import read_all
from afd.data.schema import settings_fingerprint
from afd.data.writer import shards_match, write_shards
from afd.preparation import prepare_shards, shard_folders

CHUNK_WISE = Path("configs/chunk_wise.yaml")


@dataclass(frozen=True)
class WorldShards:
    """Folders of one world.

    Attributes:
        train: all training videos.
        heldout: prompts that are looked at once a row, by the study's own measurement.
        search_train, validation: a split of `train`; each run's own evaluation sees `validation`.
        overrides: the world's, for every run in it.
    """

    train: Path
    heldout: Path
    search_train: Path
    validation: Path
    overrides: tuple[str, ...]


def make_world(name: str, preset: Preset, out: Path) -> WorldShards:
    """Ask the world's teacher for its videos, unless that was done, and split them.

    Every fifth training video at most becomes a validation video, so that both sides hold all kinds of prompts.
    """
    folder = out / "worlds" / name
    sizes = (
        f"teacher.num_prompts={preset.search_prompts + preset.validation_prompts}",
        f"teacher.num_heldout_prompts={preset.heldout_prompts}",
    )
    config = load_config(CHUNK_WISE, [f"output_dir={folder}", *sizes, *WORLDS[name]])
    prepare_shards(config, overwrite=True)
    train, heldout = shard_folders(config)
    samples = read_all(train)
    count = min(preset.validation_prompts, len(samples) // 5)
    chosen = {round((i + 0.5) * len(samples) / count) for i in range(count)}
    parts = {"search_train": folder / "data" / "search_train", "validation": folder / "data" / "validation"}
    for split, path in parts.items():
        part = [sample for i, sample in enumerate(samples) if (i in chosen) == (split == "validation")]
        metadata = {"split": split, "source_ids": [sample.source_id for sample in part], "fps": samples[0].fps}
        if not shards_match(path, settings_fingerprint(metadata)):
            write_shards(part, path, metadata=metadata, overwrite=True)
    return WorldShards(train, heldout, parts["search_train"], parts["validation"], WORLDS[name])
