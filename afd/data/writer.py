"""Samples to a folder of MDS shards, whole or not at all. Owns `dataset.json` and `rejects.jsonl`; reads no shard."""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afd.data.mds import ShardBuilder, encode_row, write_whole
from afd.data.schema import SCHEMA_VERSION, Reject, Sample, settings_fingerprint, to_row

DATASET_FILE = "dataset.json"
REJECTS_FILE = "rejects.jsonl"
SHARD_BYTES = 32 << 20
# Room left on the disk beyond what is known to be written.
_FREE_RESERVE = 64 << 20
# Rejects named in the log; all are in rejects.jsonl.
NUM_LOGGED = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSummary:
    """What a folder of shards holds: counts, bytes on disk, and (of `write_shards`) every reject with its reason."""

    path: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    num_rejects: int
    fingerprint: str
    rejects: tuple[Reject, ...] = ()


class ShardFolder:
    """A folder of shards in the making: rows that agree in shape and fps, and at the end the files that describe them.

    Args:
        folder: exists; gets the files.
        shard_bytes: uncompressed size at which the next shard starts.
        entries: index entries of shards that are already there.
        common: shapes and fps of their rows, as `RowFacts.common` gives them.
        teachers: the names of their teachers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        entries: Sequence[dict[str, Any]] = (),
        common: Mapping[str, Any] | None = None,
        teachers: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self.num_samples = sum(entry["samples"] for entry in entries)
        self._builder = ShardBuilder(folder, shard_bytes=shard_bytes, entries=entries)
        self._shard_bytes = shard_bytes
        self._common, self._teachers = dict(common or {}), set(teachers)

    @property
    def num_shards(self) -> int:
        """Closed shards so far."""
        return len(self._builder.entries)

    def add(self, row: "EncodedRow") -> dict[str, Any] | None:
        """Take one row; returns the index entry of the shard this closed, if any.

        Raises:
            ValueError: its shape or fps differs from the rows before.
            OSError: the disk is too full for another shard.
        """
        self._common = self._common or dict(row.common)
        if row.common != self._common:
            raise ValueError(f"every sample must have {self._common}, got {row.common} (sample {row.source_id!r})")
        if self._builder.is_starting:
            require_free(self.folder, self._shard_bytes)
        closed = self._builder.add(row.data)
        self._teachers.add(row.teacher)
        self.num_samples += 1
        return closed

    def finish(self, metadata: Mapping[str, Any], *, num_rejects: int) -> ShardSummary:
        """Close the last shard, write index.json and dataset.json, flush everything to the disk."""
        assert self.num_samples
        self._builder.close()
        self._builder.write_index()
        fingerprint = settings_fingerprint(metadata)
        described = {
            **self._common,
            "num_samples": self.num_samples,
            "teachers": sorted(self._teachers),
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint,
            "metadata": dict(metadata),
            "num_rejects": num_rejects,
        }
        text = json.dumps(described, indent=2, sort_keys=True) + "\n"
        write_whole(self.folder / DATASET_FILE, text.encode())
        num_bytes = _sync(self.folder)
        return ShardSummary(self.folder, self.num_samples, self.num_shards, num_bytes, num_rejects, fingerprint)


@dataclass(frozen=True)
class EncodedRow:
    """A sample as the bytes of its row, and what its folder must know of it."""

    data: bytes
    source_id: str
    teacher: str
    common: Mapping[str, Any]


def encode_sample(sample: Sample) -> EncodedRow:
    """Check a sample and lay it out.

    Raises:
        ValueError: as `schema.to_row`.
    """
    row = to_row(sample)
    common = {
        "latent_shape": list(row["latents"].shape),
        "prompt_embeds_shape": list(row["prompt_embeds"].shape),
        "fps": row["fps"],
    }
    return EncodedRow(encode_row(row), sample.source_id, sample.teacher, common)


def write_rejects(rejects: Iterable[Reject], path: Path) -> int:
    """Write one JSON object a line: `source_id`, `file` where there is one, `reason`, `"is_final": false` where the
    teacher may give it the next time; returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for reject in rejects:
            row: dict[str, Any] = {"source_id": reject.source_id, "file": reject.file, "reason": reject.reason}
            row = {name: text for name, text in row.items() if text}
            file.write(json.dumps(row if reject.is_final else {**row, "is_final": False}, ensure_ascii=True) + "\n")
            count += 1
    return count


def read_rejects(path: Path) -> Iterator[Reject]:
    """What `write_rejects` wrote, one line at a time.

    Raises:
        ValueError: a line is no such object.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                yield Reject(row["source_id"], row["reason"], row.get("file", ""), row.get("is_final", True))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{number} must be an object with source_id and reason: {error}") from error


def write_shards(
    samples: Iterable[Sample | Reject],
    out: Path,
    *,
    metadata: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> ShardSummary:
    """Write samples as zstd-compressed, hashed MDS shards plus index.json, dataset.json and rejects.jsonl.

    Everything goes to a hidden folder beside `out`, is synced, and is then renamed: `out` is complete or absent
    (or, with overwrite, still the old one), whatever interrupts the write.

    Args:
        samples: all of one latent shape, one prompt-embedding shape and one fps; rejects are counted.
        out: the folder to make.
        metadata: JSON settings that made the samples (codec, text encoder, teacher and its constants, sizes);
            their fingerprint tells `shards_match` whether the folder is the wanted one.
        shard_bytes: uncompressed size at which the next shard starts.
        overwrite: replace shards that are there; what is no dataset is never replaced.
    Raises:
        ValueError: `out` holds something, no sample arrived, samples disagree in shape or fps, or one is malformed.
        OSError: the disk is too full; names the path, the bytes needed and the bytes free.
    """
    out = Path(os.path.abspath(out))
    require_replaceable(out)
    if not is_vacant(out) and not overwrite:
        raise ValueError(f"{out} exists already: pass overwrite=True to replace it")
    settings_fingerprint(metadata)  # before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free(out.parent, shard_bytes)
    rejects: list[Reject] = []
    with _folder_beside(out) as folder:
        shards, seen = ShardFolder(folder, shard_bytes=shard_bytes), set[str]()
        for sample in _accepted(samples, rejects):
            if sample.source_id in seen:
                raise ValueError(f"source_id must be unique, got {sample.source_id!r} twice")
            seen.add(sample.source_id)
            shards.add(encode_sample(sample))
        if shards.num_samples == 0:
            raise ValueError(f"no sample to write to {out} ({quote_rejects(rejects, len(rejects))})")
        write_rejects(rejects, folder / REJECTS_FILE)
        summary = shards.finish(metadata, num_rejects=len(rejects))
        publish(folder, out)
    log_rejects(rejects, len(rejects))
    return replace(summary, path=out, rejects=tuple(rejects))


def quote_rejects(rejects: Sequence[Reject], count: int) -> str:
    """What an error says of `count` rejects: how many, and the first three with their reasons."""
    reasons = "; ".join(f"{reject.source_id}: {reject.reason}" for reject in rejects[:3])
    return f"{count} rejected{reasons and ': ' + reasons}"


def log_rejects(rejects: Sequence[Reject], count: int) -> None:
    """Warn of the first of `count` rejects by name, of the rest by number."""
    for reject in rejects[:NUM_LOGGED]:
        logger.warning("rejected %s: %s", reject.file or reject.source_id, reject.reason)
    if count > NUM_LOGGED:
        logger.warning("... and %d more, listed in %s", count - NUM_LOGGED, REJECTS_FILE)


def shards_match(path: Path, fingerprint: str) -> bool:
    """Tell whether `path` holds shards made by the settings of `fingerprint`; False for no or unreadable shards.

    It reads dataset.json only: the loader verifies the shards themselves.
    """
    return _describe(path).get("fingerprint") == fingerprint


def prepared_from(path: Path) -> str:
    """The `teacher.kind` whose videos were prepared as the shards of `path`; empty where dataset.json names none."""
    try:
        return str(_describe(path)["metadata"]["teacher"]["kind"])
    except (KeyError, TypeError):
        return ""


def _describe(path: Path) -> dict[str, Any]:
    """A folder's dataset.json; empty where there is none or it cannot be read."""
    try:
        described = json.loads((Path(path) / DATASET_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def _accepted(samples: Iterable[Sample | Reject], rejects: list[Reject]) -> Iterator[Sample]:
    for sample in samples:
        if isinstance(sample, Reject):
            rejects.append(sample)
        else:
            yield sample


def require_free(path: Path, needed: int) -> None:
    """Refuse to start writing what the disk has no room for.

    Raises:
        OSError: names the path, the bytes needed and the bytes free.
    """
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


def is_vacant(out: Path) -> bool:
    """Whether nothing is there: no path of this name, or an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def require_replaceable(out: Path) -> None:
    """Refuse to put shards in the place of what is no dataset.

    Raises:
        ValueError: `out` is a file, or a folder of files without dataset.json.
    """
    if not is_vacant(out) and not (out / DATASET_FILE).is_file():
        raise ValueError(f"{out} holds no {DATASET_FILE}, so it is no dataset and never replaced: name another folder")


def publish(folder: Path, out: Path) -> None:
    """Rename folder to out; shards that are there step aside first and are deleted last.

    Raises:
        ValueError: as `require_replaceable`.
    """
    require_replaceable(out)
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
