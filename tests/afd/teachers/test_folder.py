"""The folder teacher: every layout it reads, and every entry it must refuse without ending."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from afd.config import FolderSection, RunConfig, TeacherSection
from afd.data.video import decode_video
from afd.teachers.base import SourceReject, SourceVideo
from afd.teachers.folder import FolderSource
from afd.teachers.folder_metadata import Columns
from afd.teachers.sources import open_source


def _video(path: Path, content: bytes = b"video") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _read(folder: Path, **options) -> tuple[dict[str, SourceVideo], dict[str, str]]:
    """Videos by path within the folder, reject reasons by name."""
    found = list(FolderSource(folder, **options).videos())
    videos = {str(v.path.relative_to(folder.resolve())): v for v in found if isinstance(v, SourceVideo) and v.path}
    rejects = {r.source_id: r.reason for r in found if isinstance(r, SourceReject)}
    assert len(videos) + len(rejects) == len(found)
    return videos, rejects


ROWS = [
    {"file_name": "a.mp4", "caption": "a red ball", "seed": 7, "fps": 8, "licence": "CC0-1.0"},
    {"file_name": "sub/b.webm", "caption": 'says "hi", twice\nand über', "seed": 8},
]


def _write_jsonl(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")


def _write_csv(folder: Path) -> None:
    import csv

    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def _write_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "metadata.parquet")


def _write_videos2caption(folder: Path) -> None:
    rows = [{**row, "path": row["file_name"], "cap": [row["caption"], "another"]} for row in ROWS]
    rows = [{key: row[key] for key in row if key not in ("file_name", "caption")} for row in rows]
    (folder / "videos2caption.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("write", [_write_jsonl, _write_csv, _write_parquet, _write_videos2caption])
def test_every_table_says_the_same(tmp_path, write):
    _video(tmp_path / "a.mp4")
    _video(tmp_path / "videos" / "sub" / "b.webm")
    write(tmp_path)
    videos, rejects = _read(tmp_path, licence="mine")
    assert rejects == {}
    a, b = videos["a.mp4"], videos["videos/sub/b.webm"]
    assert (a.prompt, a.seed, a.licence, a.teacher) == ("a red ball", 7, "CC0-1.0", "folder")
    assert (b.prompt, b.seed, b.licence) == (ROWS[1]["caption"], 8, "mine")
    assert a.read() == b"video"
    again, _ = _read(tmp_path)
    assert [video.source_id for video in again.values()] == [video.source_id for video in videos.values()]


def test_mapping_from_file_to_caption(tmp_path):
    _video(tmp_path / "a.gif")
    (tmp_path / "videos2caption.json").write_text(json.dumps({"a.gif": "spins"}))
    assert _read(tmp_path)[0]["a.gif"].prompt == "spins"


def test_named_columns(tmp_path):
    _video(tmp_path / "a.mp4")
    (tmp_path / "metadata.jsonl").write_text('{"clip": "a.mp4", "long": "words", "caption": "other"}')
    videos, rejects = _read(tmp_path, columns=Columns("clip", "long"))
    assert videos["a.mp4"].prompt == "words"
    assert rejects == {}


def test_paired_lists_with_extended_twin(tmp_path):
    for name in ("0.mp4", "1.mp4"):
        _video(tmp_path / "videos" / name)
    (tmp_path / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\n\n")
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    (tmp_path / "prompts_extended.txt").write_text("a long cat\na long dog")
    videos, rejects = _read(tmp_path)
    assert rejects == {}
    assert [(v.prompt, v.short_prompt) for v in videos.values()] == [("a long cat", "cat"), ("a long dog", "dog")]
    (tmp_path / "prompts_extended.txt").write_text("a long cat\n")
    with pytest.raises(ValueError, match=r"as many lines, got 2 and 3"):
        _read(tmp_path)


def test_vbench_names_and_moviegen_numbers(tmp_path):
    vbench, movies = tmp_path / "vbench", tmp_path / "movies"
    for name in ("a cat-0.mp4", "a cat-1.mp4", "a well-known dog-3.mp4", "stray-0.mp4"):
        _video(vbench / name)
    (vbench / "all_dimension.txt").write_text("a cat\na well-known dog\na bird\n")
    (vbench / "all_dimension_longer.txt").write_text("A cat sits.\nA dog.\nA bird sings.\n")
    videos, rejects = _read(vbench)
    assert [(v.prompt, v.seed) for v in videos.values()] == [("A cat sits.", 0), ("A cat sits.", 1), ("A dog.", 3)]
    assert rejects == {"all_dimension.txt[2]": "no video for the prompt 'a bird'", "stray-0.mp4": "missing caption"}

    for name in ("0000.mp4", "0002.mp4"):
        _video(movies / name)
    (movies / "MovieGenVideoBench.txt").write_text("one\ntwo\nthree\n")
    videos, rejects = _read(movies)
    assert {name: v.prompt for name, v in videos.items()} == {"0000.mp4": "one", "0002.mp4": "three"}
    assert list(rejects) == ["MovieGenVideoBench.txt[1]"]
    for old, new in (("0002.mp4", "3.mp4"), ("0000.mp4", "1.mp4")):
        (movies / old).rename(movies / new)
    assert {n: v.prompt for n, v in _read(movies)[0].items()} == {"1.mp4": "one", "3.mp4": "three"}


def test_frames_and_sidecars_decode(tmp_path):
    import cv2

    pictures = np.random.default_rng(0).integers(0, 255, (11, 6, 8, 3), dtype=np.uint8)
    (tmp_path / "clip").mkdir()
    for number, picture in enumerate(pictures):
        cv2.imwrite(str(tmp_path / "clip" / f"f{number}.png"), picture[..., ::-1])
    (tmp_path / "clip.txt").write_text("noise\n")
    videos, rejects = _read(tmp_path, frames_fps=10.0)
    assert rejects == {}
    frames = decode_video(videos["clip"].read(), num_frames=11, height=6, width=8, fps=10.0)
    np.testing.assert_allclose(frames * 255, pictures, atol=1e-3)
    (tmp_path / "clip" / "f3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"clip/f3.png: no picture"):
        videos["clip"].read()


def test_every_bad_entry_is_a_reject_with_its_reason(tmp_path):
    folder, outside = tmp_path / "in", _video(tmp_path / "outside.mp4")
    _video(folder / "good.mp4")
    _video(folder / "uncaptioned.mp4")
    _video(folder / "empty.mp4", b"")
    (folder / "dir.mp4").mkdir()
    (folder / "out.mp4").symlink_to(outside)
    (folder / "loop.mp4").symlink_to("loop2.mp4")
    (folder / "loop2.mp4").symlink_to("loop.mp4")
    (folder / "cycle").symlink_to(".")
    os.mkfifo(folder / "fifo.mp4")
    _video(Path(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")))
    reasons = {
        '{"file_name": "good.mp4", "caption": "fine"}': None,
        '{"file_name": "good.mp4", "caption": "fine" }': "listed twice with the same caption",
        '{"file_name": "cycle/cycle/good.mp4", "caption": "fine"}': "listed twice with the same caption",
        '{"file_name": "good.mp4"}': "missing caption",
        '{"file_name": "good.mp4", "caption": "  "}': "missing caption, got '  '",
        '{"file_name": "good.mp4", "caption": ["x", 3], "cap": 1}': None,
        '{"file_name": "good.mp4", "caption": {"a": 1}}': "missing caption, got {'a': 1}",
        '{"file_name": "good.mp4", "caption": "\\ud800"}': "caption is not UTF-8",
        '{"file_name": "\\udcff.mp4", "caption": "x"}': "file name is not UTF-8",
        '{"file_name": "a\\u0000b.mp4", "caption": "x"}': "file name is not UTF-8",
        '{"file_name": "../outside.mp4", "caption": "x"}': "lies outside the folder",
        json.dumps({"file_name": str(outside), "caption": "x"}): "lies outside the folder",
        '{"file_name": "/etc/passwd", "caption": "x"}': "lies outside the folder",
        '{"file_name": "out.mp4", "caption": "x"}': "lies outside the folder",
        '{"file_name": "missing.mp4", "caption": "x"}': "no such file",
        '{"file_name": "empty.mp4", "caption": "x"}': "empty file (0 bytes)",
        '{"file_name": "dir.mp4", "caption": "x"}': "is a folder without frames",
        '{"file_name": ".", "caption": "x"}': "is a folder without frames",
        '{"file_name": "fifo.mp4", "caption": "x"}': "is no regular file",
        json.dumps({"file_name": "n" * 5000, "caption": "x"}): "File name too long",
        '{"file_name": "good.mp4", "caption": "s", "seed": -1}': "seed must be >= 0",
        '{"file_name": "good.mp4", "caption": "s", "fps": 0}': "fps in (0, 1000)",
        '{"caption": "x"}': "names no video",
        '{"file_name": 3, "caption": "x"}': "names no video",
        "[1]": "must be an object, got list",
        "{": "no valid JSON",
        "[" * 100_000: "no valid JSON",
        "\udcff\udcfe": "not UTF-8 (byte 0)",
        "x" * ((1 << 20) + 5): "longer than",
        '{"file_name": "loop.mp4", "caption": "x"}': "symbolic links",
    }
    (folder / "metadata.jsonl").write_bytes("\n".join(reasons).encode("utf-8", "surrogateescape"))
    found = list(FolderSource(folder).videos())
    got = [entry.reason if isinstance(entry, SourceReject) else None for entry in found]
    for (line, expected), reason in zip(reasons.items(), got, strict=False):
        assert (reason is None) == (expected is None), (line[:80], reason)
        assert (expected or "") in (reason or ""), (line[:80], reason)
    uncaptioned = {entry.source_id for entry in found[len(reasons) :] if isinstance(entry, SourceReject)}
    assert {"uncaptioned.mp4", "\\udcff.mp4", "empty.mp4"} <= uncaptioned
    for entry in found:
        if isinstance(entry, SourceReject):
            (entry.source_id + entry.reason).encode("utf-8")  # can be written anywhere


def test_csv_rejects_bad_bytes_and_goes_on(tmp_path):
    _video(tmp_path / "a.mp4")
    huge = b"a.mp4," + b"x" * ((1 << 20) + 9) + b"\n"
    (tmp_path / "metadata.csv").write_bytes(b"file_name,caption\na.mp4,\xff\xfe\n" + huge + b"a.mp4\na.mp4,good\n")
    found = list(FolderSource(tmp_path).videos())
    kinds = Counter(type(entry).__name__ for entry in found)
    assert kinds == {"SourceReject": 3, "SourceVideo": 1}
    assert [r.reason[:20] for r in found if isinstance(r, SourceReject)] == [
        "caption is not UTF-8", "no valid CSV: field ", "missing caption",
    ]  # fmt: skip


def test_unwanted_videos_are_not_given(tmp_path):
    for name in ("a", "b"):
        _video(tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    asked = []
    found = list(
        FolderSource(tmp_path).videos(lambda request: bool(asked.append(request) or request.prompt[-1] == "b"))
    )
    assert [entry.prompt for entry in found if isinstance(entry, SourceVideo)] == ["caption b"]
    assert len(asked) == 2


def test_source_from_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"teacher.folder.path must be set"):
        open_source(RunConfig(teacher=TeacherSection(kind="folder")))
    with pytest.raises(ValueError, match=r"must be a folder of videos"):
        open_source(RunConfig(teacher=TeacherSection(kind="folder", folder=FolderSection(path=tmp_path / "no"))))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("prompt")
    with pytest.raises(ValueError, match=r"several prompt lists \(one.txt, two.txt\)"):
        open_source(RunConfig(teacher=TeacherSection(kind="folder", folder=FolderSection(path=tmp_path))))
