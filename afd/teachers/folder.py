"""The folder teacher: videos somebody already made, with a table of captions. Nothing outside the folder is read.

Owns finding the files and refusing bad entries; the tables are folder_metadata.py's, decoding is preparation's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from afd.seen import Seen
from afd.teachers.base import SourceReject, SourceVideo, VideoRequest, accept_all
from afd.teachers.folder_metadata import PROMPT_FILES, Columns, Row, find_table, match_list, read_table
from afd.teachers.frames import FRAME_SUFFIXES, list_frames
from afd.teachers.prompts import check_text

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".m4v"})


class FolderSource:
    """Every captioned video of a folder, in the order of its table; what has no caption is rejected at the end.

    Args:
        folder: holds the videos, and the table unless `table` names another.
        table: None looks for metadata.jsonl, .csv or .parquet, videos2caption.json, prompts.txt with videos.txt, or
            the only prompt list; without any, `x.txt` beside `x.mp4` is its caption.
        columns: which columns hold the file and the caption.
        frames_fps: frames per second of folders of frames whose row does not say it.
        version: what the user calls this set of videos.
        licence: tag of the videos whose row has none.
    Raises:
        ValueError: no such folder or table.
    """

    teacher = "folder"

    def __init__(
        self,
        folder: Path,
        *,
        table: Path | None = None,
        columns: Columns | None = None,
        frames_fps: float = 24.0,
        version: str = "",
        licence: str = "",
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"teacher.folder.path must be a folder of videos, got {folder}")
        if table is not None and not table.is_file():
            raise ValueError(f"teacher.folder.metadata must be a file, got {table}")
        self._root = folder.resolve()
        self._table = table or find_table(folder)
        self._columns = columns or Columns()
        self._fps, self._licence, self.version = frames_fps, licence, version

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Iterator[SourceVideo | SourceReject]:
        """Yield each wanted row's video, or why it has none; then a reject for every video without a caption."""
        with Seen() as named, Seen() as given:
            yield from self._captioned(wanted, named, given)
            for path in self._files():
                relative = path.relative_to(self._root).as_posix()
                if _digest(relative) not in named and not self._is_refused(path):
                    yield SourceReject(_printable(relative), "missing caption")

    def _captioned(
        self, wanted: Callable[[VideoRequest], bool], named: Seen, given: Seen
    ) -> Iterator[SourceVideo | SourceReject]:
        """Go through the table; notes every file it names."""
        for row in self._rows():
            if isinstance(row, SourceReject):
                yield row
                continue
            found = self._find(row.file)
            if isinstance(found, str):
                yield SourceReject(f"{row.label} {_printable(row.file)}", found)
                continue
            relative = found.relative_to(self._root).as_posix()
            named.count(_digest(relative))
            identity = _digest(f"{relative}\n{row.prompt}")
            request = VideoRequest(row.prompt, _seed(row, relative), f"folder-{identity.hex()}", row.short_prompt)
            if given.count(identity):
                yield SourceReject(f"{row.label} {relative}", "listed twice with the same caption")
            elif wanted(request):
                fps = (row.fps or self._fps) if found.is_dir() else None
                licence = row.licence or self._licence
                yield request.video(teacher=self.teacher, version=self.version, path=found, fps=fps, licence=licence)

    def _rows(self) -> Iterator[Row | SourceReject]:
        if self._table is None:
            return self._sidecar_rows()
        if self._table.suffix == ".txt" and not self._table.with_name("videos.txt").is_file():
            return match_list(self._table, [str(path.relative_to(self._root)) for path in self._files()])
        if self._table.name == "videos.txt":
            names = [self._table.with_name(name) for name in PROMPT_FILES]
            table = next((name for name in names if name.is_file()), None)
            if table is None:
                raise ValueError(f"{self._table} needs one of {', '.join(PROMPT_FILES)} beside it")
            return read_table(table, self._columns)
        return read_table(self._table, self._columns)

    def _sidecar_rows(self) -> Iterator[Row | SourceReject]:
        """`x.txt` beside `x.mp4`; a video without one is reported as uncaptioned afterwards."""
        for path in self._files():
            caption, relative = path.with_suffix(".txt"), path.relative_to(self._root)
            if path.is_dir():
                caption = path.with_name(path.name + ".txt")
            if caption.is_symlink() or not caption.is_file() or check_text(str(relative)):
                continue
            try:
                with caption.open("rb") as file:
                    text = file.read(1 << 20).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                yield SourceReject(str(relative), f"caption is not UTF-8 (byte {error.start})")
                continue
            except OSError as error:
                yield SourceReject(str(relative), f"caption cannot be read: {error.strerror}")
                continue
            problem = check_text(text)
            yield SourceReject(str(relative), problem) if problem else Row(str(relative), str(relative), text)

    def _find(self, name: str) -> Path | str:
        """The file a row means, resolved and inside the folder; or why there is none."""
        try:
            candidates = [self._root / name, self._root / "videos" / name]
            path = next((path for path in candidates if os.path.lexists(path)), candidates[0])
            resolved = path.resolve(strict=True)
        except FileNotFoundError:
            return "no such file"
        except (OSError, RuntimeError) as error:  # a loop of links is either, by version of Python
            return f"cannot be read: {getattr(error, 'strerror', None) or 'loop of symbolic links'}"
        except ValueError as error:
            return f"no file name: {error}"
        if not resolved.is_relative_to(self._root):
            return "lies outside the folder"
        return self._check(resolved)

    def _check(self, path: Path) -> Path | str:
        """Whether a path inside the folder is a file with content or a folder of frames."""
        try:
            if path.is_dir():
                return path if path != self._root and list_frames(path) else "is a folder without frames"
            if not path.is_file():
                return "is no regular file"
            return path if path.stat().st_size else "empty file (0 bytes)"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    def _is_refused(self, path: Path) -> bool:
        """A link whose target is reported under its own name, or by its row."""
        return path.is_symlink() and isinstance(self._find(str(path.relative_to(self._root))), Path)

    def _files(self) -> Iterator[Path]:
        """Video files and innermost folders of frames, in the order of their names; folder links are not followed."""
        for here, folders, files in os.walk(self._root):
            folders.sort()
            kinds = {os.path.splitext(name)[1].lower() for name in files}
            paths = (Path(here, name) for name in sorted(files) if Path(name).suffix.lower() in VIDEO_SUFFIXES)
            is_frames = bool(kinds & FRAME_SUFFIXES) and not kinds & VIDEO_SUFFIXES and Path(here) != self._root
            yield from chain([Path(here)] if is_frames and not folders else [], paths)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:12]


def _seed(row: Row, relative: str) -> int:
    """The row's seed, or a number of 31 bits that belongs to the file's name."""
    return row.seed if row.seed is not None else int.from_bytes(_digest(relative)[:4], "big") >> 1


def _printable(text: str) -> str:
    return text[:300].encode("utf-8", "backslashreplace").decode()
