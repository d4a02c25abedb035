"""Lists of prompts: a text file with one prompt a line, and its twin of extended prompts. Knows no video.

A list `all_dimension.txt` may lie beside `all_dimension_extended.txt` (Self-Forcing's name) or
`all_dimension_longer.txt` (VBench's): line n of the twin is the longer wording of line n. The teacher is asked for,
and the student trained on, the longer one; the original names files and is kept as `short_prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd.teachers.base import SourceReject, VideoRequest, request_id

TWIN_SUFFIXES = ("_extended", "_longer")
MAX_LINE_BYTES = 1 << 20
_PROMPT_KEYS = ("prompt", "prompt_en", "caption", "text")
_MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True)
class Prompt:
    """One entry of a list; `short` is empty without a twin, both where a line is empty."""

    text: str
    short: str = ""


def read_prompts(path: Path) -> list[Prompt | SourceReject]:
    """Read a list (.txt, .jsonl, or VBench's .json of objects with `prompt_en`), joined with its twin if there is one.

    An empty line keeps its place, an entry that is no text becomes a reject.

    Raises:
        ValueError: no such file, a twin of another length, or a .json that cannot be read.
    """
    path = original_of(path)
    entries = list(_entries(path))
    twin = twin_of(path)
    if twin is None:
        return [entry if isinstance(entry, SourceReject) else Prompt(entry) for entry in entries]
    longer = list(_entries(twin))
    if len(longer) != len(entries):
        raise ValueError(f"{twin} must have a line for each of {path.name}'s {len(entries)}, got {len(longer)}")
    joined: list[Prompt | SourceReject] = []
    for short, text in zip(entries, longer, strict=True):
        if isinstance(text, SourceReject):
            joined.append(text)
        elif isinstance(short, SourceReject):
            joined.append(short)
        else:
            joined.append(Prompt(text or short, short))
    return joined


def twin_of(path: Path) -> Path | None:
    """The list of extended prompts beside this one, if any."""
    candidates = [path.with_name(path.stem + suffix + path.suffix) for suffix in TWIN_SUFFIXES]
    return next((twin for twin in candidates if twin.is_file()), None)


def original_of(path: Path) -> Path:
    """The list that `path` extends, where it lies beside it; otherwise `path`."""
    for suffix in TWIN_SUFFIXES:
        original = path.with_name(path.stem.removesuffix(suffix) + path.suffix)
        if path.stem.endswith(suffix) and original.is_file():
            return original
    return path


def read_lines(path: Path) -> Iterator[tuple[int, str | SourceReject]]:
    """Yield (number from 1, text without its end) of each line of a file, one at a time; other bytes than UTF-8 reject.

    Raises:
        ValueError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                name = f"{path.name}:{number}"
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield number, SourceReject(name, f"line is longer than {MAX_LINE_BYTES} bytes")
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    yield number, SourceReject(name, f"not UTF-8 (byte {error.start})")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def check_text(text: Any) -> str | None:
    """Why a value is no usable prompt, or None."""
    if not isinstance(text, str) or not text.strip():
        return f"missing caption, got {text!r}"[:200] if text not in (None, "") else "missing caption"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "caption is not UTF-8"
    if "\0" in text:
        return "caption holds a NUL character"
    return None


def requests_of(
    prompts: list[Prompt | SourceReject], *, teacher: str, version: str, videos_per_prompt: int, first_seed: int
) -> Iterator[VideoRequest | SourceReject]:
    """Every (prompt, seed) of a list: prompt by prompt, each with its own consecutive seeds; repeated prompts once."""
    seen: set[str] = set()
    for entry in prompts:
        if isinstance(entry, SourceReject):
            yield entry
            continue
        if not entry.text or entry.text in seen:
            continue
        seen.add(entry.text)
        for seed in range(first_seed, first_seed + videos_per_prompt):
            yield VideoRequest(entry.text, seed, request_id(teacher, version, entry.text, seed), entry.short)


def _entries(path: Path) -> Iterator[str | SourceReject]:
    """Each entry's text; "" keeps the place of an empty line."""
    if path.suffix == ".json":
        for number, value in enumerate(read_json(path, expected=list)):
            yield _prompt_of(value, f"{path.name}[{number}]")
        return
    for number, line in read_lines(path):
        name = f"{path.name}:{number}"
        if isinstance(line, SourceReject) or path.suffix != ".jsonl" or not line:
            problem = check_text(line) if isinstance(line, str) and line else None
            yield SourceReject(name, problem) if problem else line
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield SourceReject(name, f"no valid JSON: {error}")
            continue
        yield _prompt_of(value, name)


def _prompt_of(value: Any, name: str) -> str | SourceReject:
    text = value
    if isinstance(value, dict):
        text = next((value[key] for key in _PROMPT_KEYS if key in value), None)
    problem = check_text(text)
    return SourceReject(name, problem) if problem else str(text).strip()


def read_json(path: Path, *, expected: type | tuple[type, ...]) -> Any:
    """Read a JSON file of a bounded size.

    Raises:
        ValueError: missing, too large, not UTF-8, no JSON, or of another type than expected.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path} must be at most {_MAX_JSON_BYTES} bytes, got {path.stat().st_size}")
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, expected):
        raise ValueError(f"{path} must hold a JSON {expected}, got {type(value).__name__}")
    return value
