"""The tables that say which video of a folder shows what: jsonl, csv, parquet, json, paired text files, prompt lists.

Yields rows as they stand in the table, one at a time; whether the file exists and may be read is folder.py's.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd.teachers.base import SourceReject
from afd.teachers.prompts import TWIN_SUFFIXES, Prompt, check_text, original_of, read_json, read_lines, read_prompts

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "videos2caption.json")
VIDEO_COLUMNS = ("file_name", "video", "path", "file", "video_path", "filename", "video_name")
CAPTION_COLUMNS = ("caption", "prompt", "text", "cap")
PROMPT_FILES = ("prompts.txt", "prompt.txt", "captions.txt")
_MAX_CELL = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line of a table: a file, as written there, and what it says of it."""

    label: str
    file: str
    prompt: str
    short_prompt: str = ""
    seed: int | None = None
    fps: float | None = None
    licence: str = ""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that count; None looks for the usual ones."""

    video: str | None = None
    caption: str | None = None


def find_table(folder: Path) -> Path | None:
    """The table of a folder: the first of `TABLES`, a pair of prompts and videos.txt, or the only prompt list.

    Raises:
        ValueError: several prompt lists, of which one must be named.
    """
    for name in (*TABLES, *PROMPT_FILES):
        if (folder / name).is_file():
            return folder / name
    texts = sorted(path for path in folder.glob("*.txt") if path.is_file() and path.name != "videos.txt")
    has_video = {path.stem for path in folder.iterdir() if path.suffix.lower() != ".txt"}
    lists = [path for path in texts if path.stem not in has_video and original_of(path) == path]
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists[:5])
        raise ValueError(f"{folder} holds several prompt lists ({names}): name one with teacher.folder.metadata")
    return lists[0] if lists else None


def read_table(table: Path, columns: Columns) -> Iterator[Row | SourceReject]:
    """Yield the rows of a table in its order.

    Raises:
        ValueError: the table as a whole cannot be read.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".json": _json}
    if table.suffix not in (*readers, ".txt"):
        raise ValueError(f"teacher.folder.metadata must end in .jsonl, .csv, .parquet, .json or .txt, got {table.name}")
    if table.suffix == ".txt":
        yield from _paired(table)
        return
    for label, value in readers[table.suffix](table, columns):
        yield value if isinstance(value, SourceReject) else _row(label, value, columns)


def match_list(table: Path, videos: Sequence[str]) -> Iterator[Row | SourceReject]:
    """Rows of a prompt list without videos.txt: `<prompt>-<n>.mp4` as VBench names samples, or `<line>.mp4`.

    Args:
        table: the list; its twin, if any, gives the prompts to train on.
        videos: every video file's path within the folder.
    """
    prompts = read_prompts(table)
    by_stem = {Path(video).stem: video for video in videos}
    named: dict[str, list[tuple[int, str]]] = {}
    for stem, video in by_stem.items():
        name, dash, number = stem.rpartition("-")
        if dash and re.fullmatch("[0-9]{1,9}", number):
            named.setdefault(name, []).append((int(number), video))
        named.setdefault(stem, []).append((0, video))
    numbered = {int(stem): video for stem, video in by_stem.items() if re.fullmatch("[0-9]{1,9}", stem)}
    # Counted from 0, unless the last number says that it was from 1.
    first = 1 if 0 not in numbered and len(prompts) in numbered else 0
    for place, prompt in enumerate(prompts):
        if isinstance(prompt, SourceReject):
            yield prompt
            continue
        if not prompt.text:
            continue
        found = sorted(_named(named, prompt))
        if not found and place + first in numbered:
            found = [(0, numbered[place + first])]
        if not found:
            yield SourceReject(f"{table.name}[{place}]", f"no video for the prompt {_name(prompt)[:80]!r}")
        for seed, video in found:
            yield Row(f"{table.name}[{place}]", video, prompt.text, prompt.short, seed)


def _name(prompt: Prompt) -> str:
    return prompt.short or prompt.text


def _named(named: Mapping[str, list[tuple[int, str]]], prompt: Prompt) -> list[tuple[int, str]]:
    for name in (_name(prompt), prompt.text):
        for key in (name, name.replace("/", "_"), name[:180]):
            if key in named:
                return named[key]
    return []


def _paired(table: Path) -> Iterator[Row | SourceReject]:
    """Line n of videos.txt is shown by line n of the prompts (or of their twin)."""
    videos = table.with_name("videos.txt")
    twin = next((table.with_name(table.stem + suffix + ".txt") for suffix in TWIN_SUFFIXES), table)
    columns = [list(read_lines(path)) for path in (videos, table)]
    longer = list(read_lines(twin)) if twin.is_file() else columns[1]
    lengths = {len(_trim(lines)) for lines in (*columns, longer)}
    if len(lengths) != 1:
        raise ValueError(
            f"{table} and videos.txt must have as many lines, got {len(columns[1])} and {len(columns[0])}"
            + (f" ({twin.name}: {len(longer)})" if twin.is_file() else "")
        )
    for (number, video), (_, short), (_, text) in zip(*columns, longer, strict=False):
        bad = next((line for line in (video, text, short) if isinstance(line, SourceReject)), None)
        if bad is not None:
            yield bad
        elif isinstance(video, str) and isinstance(text, str) and isinstance(short, str) and (video or text):
            label = f"{videos.name}:{number}"
            problem = check_text(text) or (None if video else "missing video")
            if problem:
                yield SourceReject(f"{label} {video}".strip(), problem)
            else:
                yield Row(label, video, text, short if text != short else "")


def _trim(lines: list[tuple[int, str | SourceReject]]) -> list[tuple[int, str | SourceReject]]:
    """Without empty lines at the end."""
    end = len(lines)
    while end and lines[end - 1][1] == "":
        end -= 1
    return lines[:end]


def _jsonl(table: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    del columns
    for number, line in read_lines(table):
        label = f"{table.name}:{number}"
        if isinstance(line, SourceReject):
            yield label, line
        elif line:
            try:
                yield label, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield label, SourceReject(label, f"no valid JSON: {error}")


def _csv(table: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    del columns
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL))
    try:
        # Bytes that are no UTF-8 stay visible as lone surrogates, which check_text refuses.
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            while True:
                try:
                    value = next(reader, None)
                except csv.Error as error:
                    label = f"{table.name}:{reader.line_num}"
                    yield label, SourceReject(label, f"no valid CSV: {error}")
                    continue
                if value is None:
                    return
                yield f"{table.name}:{reader.line_num}", {key: cell for key, cell in value.items() if key and cell}
    except OSError as error:
        raise ValueError(f"{table} cannot be read: {error.strerror}") from error


def _parquet(table: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    known = {
        columns.video,
        columns.caption,
        *VIDEO_COLUMNS,
        *CAPTION_COLUMNS,
        "seed",
        "fps",
        "licence",
        "license",
        "short_prompt",
    }
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            names = [field.name for field in file.schema_arrow if field.name in known]
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for place in range(batch.num_rows):
                    label = f"{table.name}[{number}]"
                    number += 1
                    try:
                        yield label, {name: batch.column(name)[place].as_py() for name in names}
                    except UnicodeDecodeError as error:
                        yield label, SourceReject(label, f"not UTF-8 (byte {error.start})")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{table} cannot be read as parquet: {error}") from error


def _json(table: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    """A list of objects (FastVideo's videos2caption.json), or one object from file name to caption."""
    del columns
    value = read_json(table, expected=(list, dict))
    if isinstance(value, dict):
        for number, (file, caption) in enumerate(value.items()):
            entry = caption if isinstance(caption, dict) else {"caption": caption}
            yield f"{table.name}[{number}]", {VIDEO_COLUMNS[0]: file, **entry}
        return
    for number, entry in enumerate(value):
        yield f"{table.name}[{number}]", entry


def _row(label: str, value: Any, columns: Columns) -> Row | SourceReject:
    """Check one object of a table."""
    if not isinstance(value, dict):
        return SourceReject(label, f"must be an object, got {type(value).__name__}")
    file = _first(value, (columns.video,) if columns.video else VIDEO_COLUMNS)
    if not isinstance(file, str) or not file:
        return SourceReject(label, f"names no video (one of {', '.join(VIDEO_COLUMNS)})")
    caption = _first(value, (columns.caption,) if columns.caption else CAPTION_COLUMNS)
    if isinstance(caption, list):  # FastVideo's `cap` lists alternatives, the best one first
        caption = caption[0] if caption else None
    problem = check_text(caption) or ("file name is not UTF-8" if check_text(file) else None)
    if problem:
        return SourceReject(f"{label} {_printable(file)}", problem)
    seed, fps = (_number(value.get(name), kind) for name, kind in (("seed", int), ("fps", float)))
    if (seed is not None and seed < 0) or (fps is not None and not 0 < fps < 1000):
        return SourceReject(f"{label} {file}", f"seed must be >= 0 and fps in (0, 1000), got {seed} and {fps}")
    licence = value.get("licence") or value.get("license") or ""
    short = value.get("short_prompt") or ""
    if check_text(licence or "none") or check_text(short or "none"):
        return SourceReject(f"{label} {file}", "licence and short_prompt must be text")
    return Row(label, file, str(caption).strip(), short, None if seed is None else int(seed), fps, licence)


def _first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if value.get(name) not in (None, "")), None)


def _number(value: Any, kind: type[int] | type[float]) -> float | int | None:
    """The number a cell holds, None where it holds none; text is read as csv writes it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = kind(value) if isinstance(value, kind | str) else kind(float(value))
        return number if abs(number) < 2**63 else None
    except (ValueError, OverflowError):
        return None


def _printable(text: str) -> str:
    return text[:300].encode("utf-8", "backslashreplace").decode()
