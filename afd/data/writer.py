"""Samples to a folder of MDS shards, whole or not at all. Owns `dataset.json`; checks nothing that is read back."""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd.data.schema import COLUMNS, SCHEMA_VERSION, Reject, Sample, load_streaming, settings_fingerprint, to_row

DATASET_FILE = "dataset.json"
HASHES = ["sha1", "xxh3_64"]  # streaming wants them sorted
COMPRESSION = "zstd:3"
# Room left on the disk beyond what is known to be written.
_FREE_RESERVE = 64 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSummary:
    """What `write_shards` made: counts, bytes on disk, and every reject with its reason."""

    path: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    rejects: tuple[Reject, ...]
    fingerprint: str


def write_shards(
    samples: Iterable[Sample | Reject],
    out: Path,
    *,
    metadata: Mapping[str, Any],
    shard_bytes: int = 32 << 20,
    overwrite: bool = False,
) -> ShardSummary:
    """Write samples as zstd-compressed, hashed MDS shards plus index.json and dataset.json.

    Everything goes to a hidden folder beside `out`, is synced, and is then renamed: `out` is complete or absent
    (or, with overwrite, still the old one), whatever interrupts the write.

    Args:
        samples: all of one latent shape, one prompt-embedding shape and one fps; rejects are counted.
        out: the folder to make.
        metadata: JSON settings that made the samples (codec, text encoder, teacher and its constants, sizes);
            their fingerprint tells `shards_match` whether the folder is the wanted one.
        shard_bytes: uncompressed size at which the next shard starts.
        overwrite: replace an existing folder.
    Raises:
        ValueError: `out` exists, no sample arrived, samples disagree in shape or fps, or one is malformed.
        OSError: the disk is too full; names the path, the bytes needed and the bytes free.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: pass overwrite=True to replace it")
    fingerprint = settings_fingerprint(metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_free(out.parent, shard_bytes)
    rejects: list[Reject] = []
    with _folder_beside(out) as folder:
        described = _write_rows(_accepted(samples, rejects), folder, shard_bytes)
        described |= {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint,
            "metadata": dict(metadata),
            "rejects": [{"source_id": reject.source_id, "reason": reject.reason} for reject in rejects],
        }
        if described["num_samples"] == 0:
            reasons = "; ".join(f"{reject.source_id}: {reject.reason}" for reject in rejects[:3]) or "none was offered"
            raise ValueError(f"no sample to write to {out} ({len(rejects)} rejected: {reasons})")
        (folder / DATASET_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        num_bytes = _sync(folder)
        num_shards = len(list(folder.glob("shard.*")))
        _replace_folder(folder, out)
    for reject in rejects:
        logger.warning("rejected %s: %s", reject.source_id, reject.reason)
    return ShardSummary(out, described["num_samples"], num_shards, num_bytes, tuple(rejects), fingerprint)


def shards_match(path: Path, fingerprint: str) -> bool:
    """Tell whether `path` holds shards made by the settings of `fingerprint`; False for no or unreadable shards.

    It reads dataset.json only: the loader verifies the shards themselves.
    """
    try:
        described = json.loads((Path(path) / DATASET_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("fingerprint") == fingerprint


def _accepted(samples: Iterable[Sample | Reject], rejects: list[Reject]) -> Iterator[Sample]:
    for sample in samples:
        if isinstance(sample, Reject):
            rejects.append(sample)
        else:
            yield sample


def _write_rows(samples: Iterable[Sample], folder: Path, shard_bytes: int) -> dict[str, Any]:
    """Write the rows and return what they have in common: count, shapes, fps, teachers."""
    writer = load_streaming().MDSWriter(
        columns=COLUMNS, out=str(folder), compression=COMPRESSION, hashes=HASHES, size_limit=shard_bytes, max_workers=1
    )
    common: dict[str, Any] = {}
    seen: set[str] = set()
    teachers: set[str] = set()
    try:
        for sample in samples:
            row = to_row(sample)
            if sample.source_id in seen:
                raise ValueError(f"source_id must be unique, got {sample.source_id!r} twice")
            seen.add(sample.source_id)
            teachers.add(sample.teacher)
            shape = {
                "latent_shape": list(row["latents"].shape),
                "prompt_embeds_shape": list(row["prompt_embeds"].shape),
                "fps": row["fps"],
            }
            common = common or shape
            if shape != common:
                raise ValueError(f"every sample must have {common}, got {shape} (sample {sample.source_id!r})")
            if writer.new_shard_size * 2 > shard_bytes:
                _require_free(folder, shard_bytes)
            writer.write(row)
    except BaseException:
        writer.cancel_future_jobs()
        raise
    if not seen:
        writer.cancel_future_jobs()
        return {"num_samples": 0}
    writer.finish()
    return {**common, "num_samples": len(seen), "teachers": sorted(teachers)}


def _require_free(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < needed + _FREE_RESERVE:
        raise OSError(f"disk too full for shards at {path}: need {needed + _FREE_RESERVE} bytes, {free} are free")


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A new hidden folder on the same file system as `out`, gone afterwards unless it was renamed."""
    folder = out.with_name(f".{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_folder(folder: Path, out: Path) -> None:
    """Rename folder to out; an existing out steps aside first and is deleted last."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    had_old = out.exists()
    if had_old:
        os.replace(out, old)
    try:
        os.replace(folder, out)
    except OSError:
        if had_old:
            os.replace(old, out)
        raise
    _sync_file(out.parent)
    if had_old:
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> int:
    """Flush every file and the folder itself to the disk; return the bytes they hold."""
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in files:
        _sync_file(path)
    _sync_file(folder)
    return sum(path.stat().st_size for path in files)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
