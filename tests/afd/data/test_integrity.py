"""A folder that is missing, damaged or hostile is refused in one clear line, before streaming sees it."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data.integrity import open_dataset, read_record
from afd.data.loader import build_loader, read_all


def edit_index(shards: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (shards / "index.json").write_text(json.dumps(index))


def flip_bit(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at < 0 else at] ^= 1
    path.write_bytes(bytes(data))


def test_good_folder_opens_and_describes_itself(shards: Path) -> None:
    record = open_dataset(shards)
    assert (record.num_samples, record.latent_shape, record.prompt_embeds_shape) == (23, (3, 5, 7, 2), (6, 9))
    assert (record.fps, record.metadata["codec"]["name"]) == (10.0, "dct")
    assert open_dataset(shards) == record


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent must be a folder of shards, got nothing there"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file must be a folder of shards, got a file"):
        open_dataset(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no shard folder: it has no dataset.json"):
        open_dataset(tmp_path / "empty")


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "parent": (
        lambda i: i["shards"][0]["raw_data"].update(basename="../evil.mds"),
        "plain file name, got '../evil.mds'",
    ),
    "absolute": (lambda i: i["shards"][1]["zip_data"].update(basename="/etc/x"), "shard 1: zip_data: basename"),
    "name": (lambda i: i["shards"][0]["raw_data"].update(basename="dataset.json"), "look like shard.00000.mds"),
    "twice": (lambda i: i["shards"].append(i["shards"][0]), "appears twice"),
    "pickle": (lambda i: i["shards"][0]["column_encodings"].__setitem__(1, "pkl"), r"never pkl\), got .*'pkl'"),
    "columns": (lambda i: i["shards"][0]["column_names"].pop(), "columns must be"),
    "sizes": (lambda i: i["shards"][0]["column_sizes"].__setitem__(1, 4), "column sizes must be"),
    "bytes": (lambda i: i["shards"][0]["raw_data"].update(bytes=1 << 40), "bytes must be in"),
    "negative": (lambda i: i["shards"][0].update(samples=-1), "samples must be in"),
    "count": (lambda i: i["shards"][0].update(samples=3000), "num_samples 23 must be the index's"),
    "no hash": (lambda i: i["shards"][0]["raw_data"].update(hashes={}), "hashes must hold one of"),
    "codec": (lambda i: i["shards"][0].update(compression="bz2"), "compression must be zstd"),
    "no shard": (lambda i: i.update(shards=[]), "must be version 2 with 1 to"),
    "no list": (lambda i: i.update(shards={"a": 1}), "got version 2, no list of shards"),
    "no dict": (lambda i: i.update(shards=[7]), "must be an MDS shard"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index_is_refused(shards: Path, case: str) -> None:
    change, text = HOSTILE[case]
    edit_index(shards, change)
    before = sorted(path.name for path in shards.parent.rglob("*"))
    with pytest.raises(ValueError, match=f"(index|dataset).json.*{text}"):
        build_loader(shards, batch_size_per_rank=1, world_size=1, rank=0, seed=0)
    assert sorted(path.name for path in shards.parent.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_broken_json_is_refused(shards: Path, text: str) -> None:
    (shards / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json (is no valid JSON|must hold a JSON object)"):
        open_dataset(shards)


def test_record_and_index_must_agree(shards: Path) -> None:
    described = json.loads((shards / "dataset.json").read_text())
    for key, value in {"schema_version": 9, "num_samples": 22, "latent_shape": [3, 5, 7], "fps": 0}.items():
        (shards / "dataset.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(ValueError, match=rf"dataset.json: {key}"):
            read_record(shards)


def test_missing_and_truncated_shards_are_named(shards: Path) -> None:
    path = shards / "shard.00001.mds.zstd"
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(
        ValueError, match=rf"shard.00001.mds.zstd must have {len(data)} bytes, got {len(data) - 7}: truncated"
    ):
        open_dataset(shards)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard.00001.mds.zstd is missing"):
        open_dataset(shards)
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file"):
        open_dataset(shards)


@pytest.mark.parametrize("opened_before", [False, True])
def test_one_flipped_bit_is_found(shards: Path, opened_before: bool) -> None:
    if opened_before:
        open_dataset(shards)
    flip_bit(shards / "shard.00002.mds.zstd")
    for _ in range(2):  # and stays found
        with pytest.raises(ValueError, match=r"shard.00002.mds.zstd is damaged: sha1 must be \w{40}, got \w{40}"):
            read_all(shards)


def test_damaged_unpacked_copy_is_made_again(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = [sample.sha256 for sample in read_all(shards)]
    raw = shards / "shard.00000.mds"
    good = raw.read_bytes()
    flip_bit(raw)
    with caplog.at_level(logging.WARNING):
        assert [sample.sha256 for sample in read_all(shards)] == expected
    assert "shard.00000.mds is damaged" in caplog.text
    assert raw.read_bytes() == good


def test_shard_damaged_during_a_run_is_made_again_or_stops_it(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = build_loader(shards, batch_size_per_rank=23, world_size=1, rank=0, seed=0, shuffle=False)
    good = next(loader)
    flip_bit(shards / "shard.00003.mds")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(next(loader).latents, good.latents)
    assert "shard.00003.mds is damaged" in caplog.text
    for name in ("shard.00003.mds", "shard.00003.mds.zstd"):
        flip_bit(shards / name)
    with pytest.raises(ValueError, match=r"shard.00003.mds.zstd is damaged"):
        next(loader)


def test_file_that_unpacks_to_another_size_is_refused(shards: Path) -> None:
    edit_index(shards, lambda index: index["shards"][0]["raw_data"].update(bytes=100))
    with pytest.raises(ValueError, match=r"shard.00000.mds.zstd must unpack to 100 bytes, its header says \d+"):
        open_dataset(shards)


def test_shard_with_lying_offsets_is_refused(shards: Path) -> None:
    open_dataset(shards)
    raw = shards / "shard.00000.mds"
    data = bytearray(raw.read_bytes())
    data[8:12] = (1 << 30).to_bytes(4, "little")
    raw.write_bytes(bytes(data))

    def plain(index: dict[str, Any]) -> None:
        shard = index["shards"][0]
        shard.update(compression=None, zip_data=None)
        shard["raw_data"]["hashes"] = {"sha1": hashlib.sha1(data).hexdigest()}

    edit_index(shards, plain)
    with pytest.raises(ValueError, match=r"shard.00000.mds: its sample offsets must rise"):
        open_dataset(shards)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_asks_for_a_cache(shards: Path, tmp_path: Path) -> None:
    shards.chmod(0o555)
    with pytest.raises(ValueError, match="name a writable cache folder"):
        open_dataset(shards)
    assert len(read_all(shards, tmp_path / "cache")) == 23
