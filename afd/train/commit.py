"""One checkpoint on disk as one commit: manifest, verification, atomic publication, pruning, and the folder's lock.

A commit is a folder `step_00000030` whose MANIFEST.json lists the size and SHA-256 of every other file and carries a
digest of itself. It is written under a temporary name and renamed when complete, so a folder with a commit's name was
whole once; whether it still is, `commit_problems` tells. What the files hold is checkpoint.py's business.
"""

import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from afd.distributed import broadcast_object, world_rank
from afd.models.weights.sources import LATEST

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
LOCK = ".run.lock"
PICKLES = (".pt", ".pth", ".bin", ".pkl")
_COMMIT = re.compile(r"step_(\d{8,})")
_PREVIOUS = "previous-"
_LEFTOVER = re.compile(r"step_\d{8,}\.tmp-[0-9a-z]+")


def commit_name(step: int) -> str:
    """The folder name of a step's commit, `step_00000030`."""
    return f"step_{step:08d}"


def list_commits(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every published commit, newest first; unverified."""
    if not output_dir.is_dir():
        return []
    found = [(_COMMIT.fullmatch(entry.name), entry) for entry in output_dir.iterdir() if entry.is_dir()]
    return sorted(((int(match.group(1)), entry) for match, entry in found if match), reverse=True)


def commit_bytes(trained: int, frozen: int = 0, *, width: int, averages: int | None = None) -> int:
    """Bytes of one engine's part of a commit: master, two Adam moments and weights of what is trained.

    Args:
        trained: parameters.
        frozen: parameters whose weights stay as they are.
        width: bytes of a weight.
        averages: of the student, whose whole weights are written beside them, trained ones and averages in float32,
            frozen ones as they are held; None for the other engines, whose frozen weights are in no commit.
    """
    states = trained * (12 + width)
    return states if averages is None else states + trained * 4 * (1 + averages) + frozen * width


def list_files(folder: Path) -> list[str]:
    """Every file under a folder but the manifest, as sorted relative POSIX paths."""
    files = (entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file())
    return sorted(name for name in files if name != MANIFEST)


def persist_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Flush files to the disk and record {name: {"size": bytes, "sha256": hex}}."""
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = {"size": file.tell(), "sha256": digest}
    return records


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write MANIFEST.json with a digest of its own body, and flush it and every directory of the folder."""
    text = json.dumps({"body": body, "sha256": _body_digest(body)}, indent=1, sort_keys=True)
    write_durably(folder / MANIFEST, text)
    for directory in [folder, *(entry for entry in folder.rglob("*") if entry.is_dir())]:
        _fsync_directory(directory)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's body, checked against its own digest.

    Raises:
        ValueError: missing, not JSON, or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        body, digest = manifest["body"], manifest["sha256"]
    except OSError as error:
        raise ValueError(f"{folder}: {MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}: {MANIFEST} is not a manifest") from None
    if digest != _body_digest(body):
        raise ValueError(f"{folder}: {MANIFEST} was altered after it was written")
    return body


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def commit_problems(folder: Path, *, rank: int = 0, size: int = 1) -> list[str]:
    """What keeps a commit from being loaded; empty where nothing does. Unpickles nothing.

    Args:
        folder: the commit.
        rank: with `size`, the share of the files this process hashes; all processes together hash all.
    """
    try:
        records = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]
    problems = [f"{folder}: unlisted {name}" for name in list_files(folder) if name not in records]
    problems = [problem for problem in problems if problem.endswith(PICKLES)]
    for name in sorted(records)[rank::size]:
        path, expected = folder / name, records[name]
        if not path.is_file():
            problems.append(f"{folder}: {name} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{folder}: {name} has {path.stat().st_size} bytes, the manifest says {expected['size']}")
        elif file_sha256(path) != expected["sha256"]:
            problems.append(f"{folder}: {name} does not match its SHA-256")
    return problems


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(temporary: Path, final: Path, *, replaces: bool = False) -> None:
    """Rename a complete commit into place and point `latest` at it.

    A commit of the same step is set aside first; with `replaces` it is this run's own earlier state, and deleted.
    """
    replaced = None
    if final.exists() and replaces:
        replaced = final.rename(final.with_name(f"{final.name}.tmp-replaced"))
    elif final.exists():
        _set_aside(final)
    os.rename(temporary, final)
    _fsync_directory(final.parent)
    pointer = final.parent / f"{LATEST}.tmp"
    write_durably(pointer, f"{final.name}\n")
    os.replace(pointer, final.parent / LATEST)
    _fsync_directory(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def prune(output_dir: Path, *, newest: int, keep: int) -> None:
    """Delete commits older than the `keep` newest up to step `newest`.

    A commit of a later step can only come from a run that was rolled back: it is set aside, not deleted, so that the
    next resume does not jump to it.
    """
    commits = list_commits(output_dir)
    for step, folder in commits:
        if step > newest:
            _set_aside(folder)
    for _, folder in [commit for commit in commits if commit[0] <= newest][keep:]:
        doomed = folder.with_name(f"{folder.name}.tmp-pruned")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Delete half-written and half-deleted commits of runs that died; the caller holds the folder's lock."""
    for entry in output_dir.iterdir():
        if entry.is_dir() and _LEFTOVER.fullmatch(entry.name):
            logger.info("removing unfinished %s", entry)
            shutil.rmtree(entry)


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"abandoned_{folder.name}_{number}")).exists():
        number += 1
    logger.warning("setting %s aside as %s: another commit takes its place", folder, aside.name)
    os.rename(folder, aside)


def set_aside_run(output_dir: Path, *, keep: Iterable[Path] = ()) -> Path | None:
    """Move an earlier run's files into `previous-<k>` inside its folder, so that a fresh run overwrites nothing.

    Args:
        output_dir: the run's folder; the caller holds its lock.
        keep: files and folders; an entry of output_dir that is one or holds one stays, as do the lock and earlier
            `previous-<k>`.
    Returns:
        The new folder, or None where there was nothing to move.
    """
    kept = [path.resolve() for path in keep]
    entries = [entry for entry in output_dir.iterdir() if entry.name != LOCK and not entry.name.startswith(_PREVIOUS)]
    entries = [entry for entry in entries if not any(path.is_relative_to(entry.resolve()) for path in kept)]
    if not entries:
        return None
    number = next(k for k in itertools.count(1) if not (output_dir / f"{_PREVIOUS}{k}").exists())
    folder = output_dir / f"{_PREVIOUS}{number}"
    folder.mkdir()
    for entry in entries:
        entry.rename(folder / entry.name)
    return folder


def write_durably(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLock:
    """Keeps two runs from writing into one output folder; rank 0 holds it, all ranks learn the verdict.

    The kernel drops the lock when the holder dies, so a lock is never stale. Collective to enter.

    Raises:
        ValueError: on entering, when another process holds it; names that process and host.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self._path = Path(output_dir) / LOCK
        self._file: Any = None

    def check(self) -> None:
        """Say before any collective that another run holds the lock; any rank may ask, nothing is kept.

        Raises:
            ValueError: another process holds it.
        """
        if not self._path.exists():
            return
        with open(self._path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(self._problem(file.read())) from None

    def _problem(self, holder: str) -> str:
        who = holder.strip() or "an unknown process"
        return f"output folder {self._path.parent} is in use by another run: {who}"

    def __enter__(self) -> "RunLock":
        problem = broadcast_object(self._acquire() if world_rank() == 0 else None)
        if problem:
            raise ValueError(problem)
        return self

    def _acquire(self) -> str | None:
        """Take the lock, or tell who has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self._path, "a+")  # noqa: SIM115 - stays open: closing it drops the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            problem = self._problem(file.read())
            file.close()
            return problem
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
