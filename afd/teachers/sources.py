"""Configuration to the source it asks for. Knows the sections; each teacher sees plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from afd.config import RunConfig
from afd.teachers.base import SourceReject, SourceVideo, Teacher, VideoRequest, VideoSource, accept_all
from afd.teachers.folder import FolderSource
from afd.teachers.folder_metadata import Columns


def open_source(config: RunConfig) -> VideoSource:
    """The source of `teacher.kind`; physics has none: its prompts are made, not listed (see `GeneratedSource`).

    Raises:
        ValueError: a field the kind needs is missing, or what it names cannot be used.
    """
    teacher = config.teacher
    if teacher.kind == "folder":
        folder = teacher.folder
        return FolderSource(
            _required(folder.path, "teacher.folder.path"),
            table=folder.metadata,
            columns=Columns(folder.video_column, folder.caption_column),
            frames_fps=folder.frames_fps,
            version=folder.version,
            licence=teacher.licence,
        )
    raise ValueError(f"teacher.kind must be folder, http or pipeline to read videos, got {teacher.kind!r}")


def _required(path: Path | None, name: str) -> Path:
    if path is None:
        raise ValueError(f"{name} must be set for this teacher.kind")
    return path


class GeneratedSource:
    """A source of a teacher that answers at once and in memory: the built-in world.

    Args:
        generator: the teacher.
        requests: what to ask it, in order.
        teacher, version: as in `SourceVideo`.
    """

    def __init__(self, generator: Teacher, requests: Sequence[VideoRequest], *, teacher: str, version: str) -> None:
        self._generator, self._requests = generator, requests
        self.teacher, self.version = teacher, version

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Iterator[SourceVideo | SourceReject]:
        """Ask for each wanted request when it is its turn."""
        for request in self._requests:
            if not wanted(request):
                continue
            finished = self._generator.generate(request.prompt, request.seed)
            yield SourceVideo(
                request.prompt, request.seed, finished.source_id, self.teacher, self.version, data=finished.mp4
            )
