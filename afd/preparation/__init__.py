"""Teacher videos to shards: decode, check, encode, write. What `afd prepare` and the quick start's first minute do.

    intake.py     numbers the requests, splits them by prompt, refuses duplicates
    pool.py       decoding processes that may die; results in order. worker.py is such a process, decoding.py its work
    encoding.py   clips to rows: codec and text encoder, in batches
    journal.py    what is done, on the disk after every row: a killed preparation goes on where it was
    published.py  shards in place, to which a later pass adds what the teacher did not give for now
    plan.py       the source, its split, the settings, and which folders may be replaced
    pipeline.py   all of it, as one loop

Importing the package imports no torch: each decoding process does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from afd.config import RunConfig
    from afd.data.writer import ShardSummary

Overwrite = bool | Literal["built_in"]


def shard_folders(config: RunConfig) -> tuple[Path, Path]:
    """Training and held-out shard folders of a run, defaults filled in."""
    data = config.output_dir / "data"
    return config.data.train_shards or data / "train", config.data.heldout_shards or data / "heldout"


def shard_places(config: RunConfig) -> tuple[tuple[Path, str | None], tuple[Path, str | None]]:
    """(folder, remote) of the training and of the held-out shards; remote is None for shards that are here."""
    train, heldout = shard_folders(config)
    return (train, config.data.train_remote), (heldout, config.data.heldout_remote)


def prepare_shards(config: RunConfig, *, overwrite: Overwrite = False, retry: bool = False) -> dict[str, ShardSummary]:
    """Read the teacher's videos and write both splits' shards; folders that already match are kept.

    Args:
        config: the run's.
        overwrite: replace shards that were made with other settings, and drop an unfinished preparation with others;
            "built_in" only what lies in `output_dir/data` and was made by the built-in world. What is no dataset is
            never replaced.
        retry: ask again for what the teacher did not give for now (rejects that are not final), and append it to the
            shards. Without it shards that are there stay as they are: a run that resumes finds what it began with.
    Returns:
        The summaries of what was written, by split; empty when everything was there.
    Raises:
        ValueError: there is no such device as `prepare.device`, a folder (or an unfinished preparation) holds other
            shards and overwrite is False, the folders are not apart, a split would be empty (what was encoded is
            kept), or the teacher is not queryable.
        OSError: the disk is too full.
    """
    from afd.device import checked_device
    from afd.preparation.pipeline import prepare

    checked_device(config.prepare.device, "prepare.device")
    return prepare(config, overwrite=overwrite, retry=retry)
