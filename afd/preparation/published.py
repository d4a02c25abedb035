"""Shards that are in place, as the beginning of a pass that asks again for what they lack.

A teacher may fail for now (a service that is down, a budget used up): such a reject is not final. A later pass asks
for every request that is neither in the shards nor finally rejected, and appends what comes as further shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afd.data.inspection import read_folder
from afd.data.integrity import read_record
from afd.data.mds import INDEX_FILE
from afd.data.schema import Reject, Sample
from afd.data.writer import DATASET_FILE, REJECTS_FILE, read_rejects
from afd.seen import Seen

NoteVideo = Callable[[Sample], None]


@dataclass
class PublishedSplit:
    """One split's index entries and what its rows share."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)
    teachers: set[str] = field(default_factory=set)

    @property
    def num_samples(self) -> int:
        return sum(entry["samples"] for entry in self.entries)


class Published:
    """What a pass begins with; nothing for the first one.

    Attributes:
        splits: by name.
        num_rejects: final ones.
        digest: names exactly these shards and rejects; empty for nothing.
    """

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        """Read the records of the folders.

        Raises:
            ValueError: a folder is broken.
        """
        self._folders = dict(folders or {})
        self._settled, self._has_settled = Seen(), False
        self.splits: dict[str, PublishedSplit] = {}
        digest = hashlib.sha256()
        for split, folder in self._folders.items():
            read_record(folder)  # checks both files
            described = json.loads((folder / DATASET_FILE).read_text())
            index = (folder / INDEX_FILE).read_bytes()
            digest.update(index)
            common = {name: described[name] for name in ("latent_shape", "prompt_embeds_shape", "fps")}
            self.splits[split] = PublishedSplit(json.loads(index)["shards"], common, set(described["teachers"]))
        self.num_rejects = 0
        for reject in self.rejects():
            digest.update(reject.source_id.encode("utf-8", "surrogatepass"))
            self.settle(reject.source_id)
            self.num_rejects += 1
        self.digest = digest.hexdigest() if self._folders else ""

    def split(self, name: str) -> PublishedSplit:
        """One split; an empty one for what is not there."""
        return self.splits.get(name) or PublishedSplit()

    def note_samples(self, note: NoteVideo) -> None:
        """Read every sample once: it is settled, and `note` learns of its video.

        Raises:
            ValueError: a shard is damaged.
        """
        for folder in self._folders.values():
            for sample in read_folder(folder):
                self.settle(sample.source_id)
                note(sample)

    def settle(self, source_id: str) -> None:
        """Count a request as done before this pass."""
        self._has_settled = True
        self._settled.count(_digest(source_id))

    def is_settled(self, source_id: str) -> bool:
        """Whether a request is in the shards, finally rejected, or done before this pass."""
        return self._has_settled and _digest(source_id) in self._settled

    def rejects(self) -> Iterator[Reject]:
        """The final rejects, in order, from the disk."""
        for folder in self._folders.values():
            if (folder / REJECTS_FILE).is_file():
                yield from (reject for reject in read_rejects(folder / REJECTS_FILE) if reject.is_final)

    def link(self, split: str, folder: Path) -> None:
        """Put the split's shards into another folder beside it, without copying where the file system can."""
        for entry in self.split(split).entries:
            name = (entry.get("zip_data") or entry["raw_data"])["basename"]
            source, target = self._folders[split] / name, folder / name
            try:
                os.link(source, target)
            except OSError:  # a file system without hard links
                shutil.copy2(source, target)

    def close(self) -> None:
        """Free what is kept on the disk."""
        self._settled.close()


def has_unsettled(folder: Path) -> bool:
    """Whether some request may still succeed: a reject of the training folder that is not final."""
    path = folder / REJECTS_FILE
    return path.is_file() and any(not reject.is_final for reject in read_rejects(path))


def _digest(source_id: str) -> bytes:
    return hashlib.sha256(source_id.encode("utf-8", "surrogatepass")).digest()[:16]
