"""Shards to a node's own disk: verified copies under a stable name, made once per node and kept between jobs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from afd.data.integrity import open_dataset
from afd.data.writer import DATASET_FILE


def stage_shards(source: Path, scratch: Path, name: str) -> Path:
    """Copy a shard folder, uncompressed, to `scratch` and point `scratch/name` at the copy.

    The copy's own folder is named by its index, so another data set never mixes with it, and a copy that an
    interrupted job left half done is completed; every file is verified and appears whole or not at all.

    Args:
        source: a folder made by `write_shards`.
        scratch: a folder on the node's disk; made if absent.
        name: what the link is called, such as "train".
    Returns:
        The link, a folder that reads like `source`.
    Raises:
        ValueError: the source is damaged, or the link's name is taken by something else.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    copy = open_dataset(source, cache=scratch).path
    _appear(copy / DATASET_FILE, lambda temporary: temporary.write_bytes((source / DATASET_FILE).read_bytes()))
    link = scratch / name
    if os.path.lexists(link) and not link.is_symlink():
        raise ValueError(f"{link} must be free or a link made by staging, got a file or folder: choose another --to")
    _appear(link, lambda temporary: temporary.symlink_to(copy.name))
    return link


def _appear(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or link under another name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    make(temporary)
    os.replace(temporary, path)
