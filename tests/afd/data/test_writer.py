"""Shards appear whole or not at all, and tell what made them."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from afd.data.loader import read_all
from afd.data.mds import COMPRESSION, HASHES, drop_unfinished, write_whole
from afd.data.schema import COLUMNS, Reject, Sample, load_streaming, settings_fingerprint, to_row
from afd.data.writer import publish, shards_match, write_shards

WORKER = Path(__file__).with_name("writer_worker.py")


def test_plain_streaming_reads_our_shards(shards: Path, sample: Callable[[int], Sample]) -> None:
    dataset = load_streaming().StreamingDataset(local=str(shards), batch_size=1, shuffle=False, validate_hash="sha1")
    rows = list(dataset)
    assert [row["source_id"] for row in rows] == [f"physics/{i}" for i in range(23)]
    for i, row in enumerate(rows):
        assert torch.equal(torch.from_numpy(row["latents"]).view(torch.bfloat16), sample(i).latents)
        assert row["video_mp4"] == (sample(i).video_mp4 or b"")


def test_summary_and_record_tell_what_was_written(tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    metadata = {"codec": "dct", "teacher": {"gravity": 1.0}}
    stream = [sample(0), Reject("physics/bad", "too short"), sample(1)]
    summary = write_shards(stream, tmp_path / "deep" / "shards", metadata=metadata)
    assert (summary.num_samples, summary.num_shards) == (2, 1)
    assert summary.rejects == (Reject("physics/bad", "too short"),)
    assert summary.num_bytes == sum(path.stat().st_size for path in summary.path.iterdir())
    described = json.loads((summary.path / "dataset.json").read_text())
    assert described["latent_shape"] == [3, 5, 7, 2]
    assert described["metadata"] == metadata
    assert described["num_rejects"] == 1
    rejects = (summary.path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in rejects] == [{"source_id": "physics/bad", "reason": "too short"}]
    index = json.loads((summary.path / "index.json").read_text())
    assert index["shards"][0]["hashes"] == ["sha1", "xxh3_64"]
    assert index["shards"][0]["compression"].startswith("zstd")


def test_shards_are_byte_for_byte_what_streaming_writes(tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    ours = write_shards(map(sample, range(9)), tmp_path / "ours", metadata={}, shard_bytes=4000).path
    writer = load_streaming().MDSWriter(
        columns=COLUMNS, out=str(tmp_path / "theirs"), compression=COMPRESSION, hashes=HASHES, size_limit=4000
    )
    for i in range(9):
        row = to_row(sample(i))
        bits = {name: row[name].view(torch.int16).numpy().view("uint16") for name in ("latents", "prompt_embeds")}
        writer.write(row | bits)
    writer.finish()
    theirs = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(theirs) == 4
    for name in theirs:
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_fingerprint_tells_the_right_shards(shards: Path, tmp_path: Path) -> None:
    metadata = json.loads((shards / "dataset.json").read_text())["metadata"]
    assert shards_match(shards, settings_fingerprint(metadata))
    assert not shards_match(shards, settings_fingerprint({**metadata, "codec": "vae"}))
    assert not shards_match(tmp_path / "absent", settings_fingerprint(metadata))
    (shards / "dataset.json").write_text("[]")
    assert not shards_match(shards, settings_fingerprint(metadata))


def test_failure_leaves_nothing_behind(tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    def breaks() -> Iterator[Sample]:
        yield from map(sample, range(12))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(breaks(), tmp_path / "shards", metadata={}, shard_bytes=4000)
    odd = dataclasses.replace(sample(1), latents=sample(1).latents[:, :4])
    with pytest.raises(ValueError, match=r"every sample must have .*\[3, 5, 7, 2\].*got .*\[3, 4, 7, 2\].*'physics/1'"):
        write_shards([sample(0), odd], tmp_path / "shards", metadata={})
    with pytest.raises(ValueError, match="source_id must be unique, got 'physics/0' twice"):
        write_shards([sample(0), sample(0)], tmp_path / "shards", metadata={})
    with pytest.raises(ValueError, match=r"no sample to write .*\(1 rejected: a: why\)"):
        write_shards([Reject("a", "why")], tmp_path / "shards", metadata={})
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_killed_writer_leaves_no_half_folder(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(tmp_path / "shards")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert not (tmp_path / "shards").exists()


def test_existing_shards_are_replaced_only_when_asked(shards: Path, sample: Callable[[int], Sample]) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write_shards([sample(5)], shards, metadata={})
    with pytest.raises(ValueError, match="no sample"):
        write_shards([], shards, metadata={}, overwrite=True)
    assert len(read_all(shards)) == 23
    write_shards([sample(5)], shards, metadata={}, overwrite=True)
    assert [each.source_id for each in read_all(shards)] == ["physics/5"]
    assert os.listdir(shards.parent) == ["shards"]


def test_what_is_no_dataset_is_never_replaced(tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    out, made = tmp_path / "precious", tmp_path / "made"
    out.mkdir()
    write_shards([sample(5)], out, metadata={})  # an empty folder holds nothing to lose
    (out / "dataset.json").unlink()
    kept = sorted(os.listdir(out))
    with pytest.raises(ValueError, match=r"precious holds no dataset\.json, so it is no dataset and never replaced"):
        write_shards([sample(6)], out, metadata={}, overwrite=True)
    made.mkdir()
    with pytest.raises(ValueError, match=r"precious holds no dataset\.json"):
        publish(made, out)
    assert sorted(os.listdir(out)) == kept
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"file holds no dataset\.json"):
        write_shards([sample(6)], tmp_path / "file", metadata={}, overwrite=True)


def test_full_disk_is_said_before_writing(
    tmp_path: Path, sample: Callable[[int], Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OSError, match=r"disk too full for shards at .*: need \d+ bytes, 1 are free"):
        write_shards([sample(0)], tmp_path / "shards", metadata={})
    assert os.listdir(tmp_path) == []


def test_what_a_killed_write_leaves_is_dropped_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "shard.00000.mds.zstd", b"whole")
    (tmp_path / ".kept").write_text("not ours")

    def stop(*_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("os.replace", stop)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "shard.00001.mds.zstd", b"half")
    assert len(list(tmp_path.iterdir())) == 3
    drop_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept", "shard.00000.mds.zstd"]
