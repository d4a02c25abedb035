"""Shards made available one by one: fetched from a remote, verified and unpacked when they are first read.

A remote is anything mosaicml-streaming has a downloader for; its index is checked here before `streaming` sees it, and
no file name of it is followed outside the local folder. A shard that arrives damaged is fetched again, three times at
most; the last bad copy stays in `quarantine/` for a look, and the run stops with the shard's name. With a limit the
local copy drops the shards that were not read for longest; they are fetched again when their turn comes.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from afd.data.integrity import (
    FileRecord,
    cache_folder,
    lock_folder,
    read_record,
    unpack_shard,
    verify_file,
    write_plain_index,
)
from afd.data.mds import INDEX_FILE
from afd.data.schema import load_streaming
from afd.data.writer import DATASET_FILE

QUARANTINE = "quarantine"
MAX_FETCHES = 3
_TIMEOUT_S = 300.0
_NUM_FETCHERS = 4
# Ranks of a host share the local folder; two shards rarely share a lock.
_NUM_LOCKS = 64
# Reads of a shard that another process drops each time before it is open.
_MAX_READS = 20
_Rows = TypeVar("_Rows")
# What the clouds' SDKs raise that is neither an OSError nor a RuntimeError. Source: each SDK's exceptions module.
_SDK_ERRORS = {
    "azure.core.exceptions": ("AzureError",),
    "boto3.exceptions": ("Boto3Error",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.resumable_media.common": ("InvalidResponse", "DataCorruption"),
    "oci.exceptions": ("ServiceError", "ClientError", "RequestException"),
    "paramiko.ssh_exception": ("SSHException",),
}

logger = logging.getLogger(__name__)


class ShardStore:
    """One folder of shards, its record checked; `ensure` makes a shard readable.

    Attributes:
        record: its `path` is the folder with the uncompressed shards.
    """

    def __init__(
        self, shards: Path, *, cache: Path | None = None, remote: str | None = None, limit: int | None = None
    ) -> None:
        """Read and check the record; no shard is touched.

        Args:
            shards: the folder `write_shards` made; with a remote, the local copy (made if absent).
            cache: where uncompressed shards go; by default beside the packed ones.
            remote: where files that are missing or damaged come from.
            limit: bytes that the local copy of a remote may keep, shards on their way on top; None keeps all.
        Raises:
            ValueError: the record is missing or broken, or says something it must not; or the limit is less than two
                shards.
        """
        self._remote = None if remote is None else remote.removeprefix("file://").rstrip("/")
        self._source = Path(shards).absolute()
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if self._remote is not None:
            self._fetch_record()
        self.record = read_record(self._source)
        if cache is not None:
            target = cache_folder(Path(cache), self.record)
            with lock_folder(target):
                write_plain_index(self.record, target)
            self.record = replace(self.record, path=target)
        self._limit = None if remote is None else limit
        largest = max(shard.raw.size for shard in self.record.shards)
        if self._limit is not None and self._limit < 2 * largest:
            raise ValueError(
                f"the limit of the local copy {self._source} must hold two shards of {largest} bytes, got {self._limit}"
            )

    def ensure(self, number: int) -> Path:
        """Fetch, verify and unpack shard `number` unless that is done; returns its uncompressed file.

        Raises:
            ValueError: it is missing or damaged, and so is every copy the remote gave.
        """
        shard = self.record.shards[number]
        path = self.record.path / shard.raw.name
        if self._is_ready(path, shard.raw):
            self._note_use(path)
            return path
        with lock_folder(self.record.path, _lock_name(number)):
            if self._limit is not None and self._is_ready(path, shard.raw):
                return path  # another process was faster
            packed = shard.packed or shard.raw
            if self._remote is not None and not self._is_ready(self._source / packed.name, packed):
                self._fetch(packed)
            unpack_shard(shard, self._source, self.record.path)
            if self._limit is not None and self._source / packed.name != path:
                (self._source / packed.name).unlink()
        self._note_use(path)
        self._trim(keep=path)
        return path

    def read(self, number: int, read: Callable[[Path], _Rows]) -> _Rows:
        """Call `read`, which opens shard `number`'s file, with the shard in place: again if another process of this
        host dropped it in the meantime.

        Raises:
            ValueError: as `ensure`; or the shard is dropped each time, because the limit is too small for all who read.
        """
        path = self.record.path / self.record.shards[number].raw.name
        for _ in range(_MAX_READS):
            try:
                return read(self.ensure(number))
            except FileNotFoundError:
                if self._limit is None:
                    raise
        raise ValueError(f"{path} is dropped faster than it is read: data.cache_limit_gib is too small")

    def _note_use(self, path: Path) -> None:
        """Its time of access orders what is dropped; its time of change says that it was verified, and stays."""
        if self._limit is not None:
            try:
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            except FileNotFoundError:  # dropped by another process: `read` fetches it again
                logger.debug("%s was dropped meanwhile", path)

    def _trim(self, *, keep: Path) -> None:
        """Drop the shards that were not read for longest, until the rest is within the limit."""
        if self._limit is None:
            return
        with lock_folder(self.record.path, ".lock-trim"):
            files = []
            for number, shard in enumerate(self.record.shards):
                path = self.record.path / shard.raw.name
                if path.exists():
                    files.append((path.stat().st_atime_ns, shard.raw.size, number, path))
            total = sum(size for _, size, _, _ in files)
            for _, size, number, path in sorted(files):
                if total <= self._limit:
                    return
                if path != keep:
                    with lock_folder(self.record.path, _lock_name(number)):  # whoever unpacks it has it to the end
                        path.unlink(missing_ok=True)
                    total -= size

    def ensure_all(self, numbers: Iterable[int] | None = None) -> None:
        """Make many shards readable, by default all; several downloads go side by side."""
        wanted = list(range(len(self.record.shards)) if numbers is None else numbers)
        if self._remote is None or len(wanted) < 2:
            for number in wanted:
                self.ensure(number)
            return
        with ThreadPoolExecutor(_NUM_FETCHERS, thread_name_prefix="fetch") as fetchers:
            list(fetchers.map(self.ensure, wanted))

    def _is_ready(self, path: Path, expected: FileRecord) -> bool:
        """Whether a file is there and right (one stat, once it was verified); a damaged one is reported and goes."""
        if not os.path.lexists(path):
            return False
        try:
            verify_file(path, expected)
        except ValueError as error:
            if self._remote is None and path.parent == self._source and expected.name == path.name:
                return False  # the user's own file: unpack_shard says what is wrong with it
            if os.path.lexists(path):
                logger.warning("%s; fetching it again", error)
                path.unlink(missing_ok=True)
            return False
        except FileNotFoundError:  # dropped by another process between two looks
            return False
        return True

    def _fetch(self, expected: FileRecord) -> None:
        incoming = self._source / f".incoming.{expected.name}"
        problem = ""
        for _ in range(MAX_FETCHES):
            incoming.unlink(missing_ok=True)
            try:
                self._download(expected.name, incoming)
                verify_file(incoming, expected)
            except ValueError as error:
                problem = str(error)
                logger.warning("%s", problem)
                continue
            os.replace(incoming, self._source / expected.name)
            return
        kept = ""
        if incoming.exists():
            (self._source / QUARANTINE).mkdir(exist_ok=True)
            os.replace(incoming, self._source / QUARANTINE / expected.name)
            kept = f"; the last copy is {self._source / QUARANTINE / expected.name}"
        raise ValueError(
            f"shard {expected.name} of {self._remote} cannot be had in {MAX_FETCHES} tries: {problem}{kept}"
        )

    def _fetch_record(self) -> None:
        """Bring dataset.json and index.json here, checked; what is here already stays: a run's data does not change."""
        self._source.mkdir(parents=True, exist_ok=True)
        with lock_folder(self._source):
            if (self._source / INDEX_FILE).is_file() and (self._source / DATASET_FILE).is_file():
                return
            incoming = self._source / ".incoming"
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.mkdir()
            try:
                for name in (DATASET_FILE, INDEX_FILE):
                    self._download(name, incoming / name)
                read_record(incoming)
                for name in (DATASET_FILE, INDEX_FILE):  # the index last: with it the folder counts as there
                    os.replace(incoming / name, self._source / name)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)

    def _download(self, name: str, to: Path) -> None:
        """Fetch one file through streaming's downloader for this kind of remote.

        Raises:
            ValueError: there is no such file, no such kind of remote, or the way there is broken; names the file.
        """
        assert self._remote is not None
        load_streaming()
        downloads = importlib.import_module("streaming.base.storage.download")
        address = f"{self._remote}/{name}"
        try:
            downloader = self._idle.get_nowait()  # logged in already; one for each download that is under way
        except queue.Empty:
            downloader = None
        try:
            downloader = downloader or downloads.CloudDownloader.get(address)
            downloader.download(address, str(to), _TIMEOUT_S)
        except (OSError, ValueError, RuntimeError, ImportError, *_sdk_errors()) as error:
            raise ValueError(f"{address} cannot be fetched: {' '.join(str(error).split())}") from error
        self._idle.put(downloader)


def _lock_name(number: int) -> str:
    return f".lock-{number % _NUM_LOCKS}"


def _sdk_errors() -> tuple[type[Exception], ...]:
    """The errors of the SDKs that are imported by now."""
    modules = ((sys.modules.get(name), classes) for name, classes in _SDK_ERRORS.items())
    return tuple(getattr(module, each) for module, classes in modules for each in classes if hasattr(module, each))
