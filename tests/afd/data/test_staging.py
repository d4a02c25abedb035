"""Staged shards read like their source, are completed after an interruption, and never mix."""

import shutil
from pathlib import Path

import pytest

from afd.data.integrity import open_dataset, read_record
from afd.data.loader import read_all
from afd.data.staging import stage_shards


def test_staged_folder_reads_like_its_source(shards: Path, tmp_path: Path) -> None:
    link = stage_shards(shards, tmp_path / "scratch", "train")
    assert link == tmp_path / "scratch" / "train"
    assert read_record(link).content == read_record(shards).content
    expected, got = read_all(shards), read_all(link)
    assert [each.prompt for each in got] == [each.prompt for each in expected]
    assert all(mine.latents.equal(theirs.latents) for mine, theirs in zip(got, expected, strict=True))


def test_what_an_interrupted_job_left_is_completed_and_what_is_whole_is_kept(shards: Path, tmp_path: Path) -> None:
    link = stage_shards(shards, tmp_path / "scratch", "train")
    whole, short, missing = sorted(link.resolve().glob("shard.*.mds"))[:3]
    inode = whole.stat().st_ino
    short.write_bytes(short.read_bytes()[:100])
    missing.unlink()
    stage_shards(shards, tmp_path / "scratch", "train")
    assert whole.stat().st_ino == inode
    assert open_dataset(link).num_samples == 23


def test_damaged_source_and_taken_name_are_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="train must be free or a link made by staging, got a file or folder"):
        stage_shards(shards, tmp_path / "scratch", "train")
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    packed = next(iter(damaged.glob("shard.*")))
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes, got"):
        stage_shards(damaged, tmp_path / "other", "train")
