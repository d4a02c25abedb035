"""Remote shards: fetched when read, checked on arrival, fetched again when damaged, refused when hostile."""

import importlib
import itertools
import json
import os
import random
import shutil
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data.loader import ShardLoader, build_loader, iterate, read_all
from afd.data.schema import Sample, load_streaming
from afd.data.store import ShardStore


def alone(shards: Path, batch_size: int = 4, **options: Any) -> ShardLoader:
    return build_loader(shards, batch_size_per_rank=batch_size, world_size=1, rank=0, seed=3, **options)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_remote_shards_give_the_same_batches_and_come_when_read(shards: Path, tmp_path: Path, scheme: str) -> None:
    local = tmp_path / "local"
    far, near = alone(local, remote=f"{scheme}{shards}/").read_ahead(2), alone(shards)
    assert not list(local.glob("*.mds"))
    for _ in range(9):
        first, second = next(far), next(near)
        assert torch.equal(first.sample_ids, second.sample_ids)
        assert torch.equal(first.latents, second.latents)
    far.close()
    assert far.state_dict() == near.state_dict()
    assert len(list(local.glob("*.mds"))) == len(far.record.shards)


def test_only_the_shards_that_are_read_are_fetched(shards: Path, tmp_path: Path) -> None:
    loader = alone(tmp_path / "local", 2, remote=str(shards), shuffle=False)
    next(loader)
    assert [path.name for path in sorted((tmp_path / "local").glob("*.mds"))] == ["shard.00000.mds"]


def test_a_shard_that_arrives_damaged_is_fetched_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Callable[[int], Sample]
) -> None:
    plain, count = ShardStore._download, itertools.count()

    def damage_twice(self: ShardStore, name: str, to: Path) -> None:
        plain(self, name, to)
        if name.startswith("shard.00001") and next(count) < 2:
            flip_bit(to)

    monkeypatch.setattr(ShardStore, "_download", damage_twice)
    read = read_all(tmp_path / "local", remote=str(shards))
    assert [each.source_id for each in read] == [sample(i).source_id for i in range(23)]
    assert next(count) == 3
    assert not (tmp_path / "local" / "quarantine").exists()


def test_a_shard_damaged_at_its_source_stops_the_run_by_name_and_is_kept_apart(shards: Path, tmp_path: Path) -> None:
    flip_bit(shards / "shard.00002.mds.zstd")
    stream = iterate(tmp_path / "local", remote=str(shards))
    with pytest.raises(ValueError, match=r"shard shard.00002.mds.zstd of .* cannot be had in 3 tries: .*damaged"):
        list(stream)
    assert (tmp_path / "local" / "quarantine" / "shard.00002.mds.zstd").is_file()
    assert not (tmp_path / "local" / "shard.00002.mds.zstd").exists()
    (shards / "shard.00003.mds.zstd").unlink()
    with pytest.raises(ValueError, match=r"shard.00003.mds.zstd cannot be fetched"):
        ShardStore(tmp_path / "local", remote=str(shards)).ensure(3)


def test_a_local_copy_that_goes_bad_is_fetched_again(shards: Path, tmp_path: Path, sample: Any) -> None:
    local = tmp_path / "local"
    read_all(local, remote=str(shards))
    flip_bit(local / "shard.00000.mds")
    flip_bit(local / "shard.00000.mds.zstd")
    (local / "shard.00001.mds").unlink()
    assert [each.seed for each in read_all(local, remote=str(shards))] == [sample(i).seed for i in range(23)]


def test_a_hostile_remote_index_writes_nothing(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../evil.mds"
    (shards / "index.json").write_text(json.dumps(index))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"plain file name, got '\.\./evil\.mds'"):
            ShardStore(tmp_path / "local", remote=str(shards))
    assert os.listdir(tmp_path / "local") == [".lock"]


def test_other_remotes_go_to_streamings_downloader(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_streaming()
    downloads = importlib.import_module("streaming.base.storage.download")
    asked = []

    class FakeS3(downloads.LocalDownloader):
        def _validate_remote_path(self, path: str) -> None:
            assert path.startswith("s3://bucket/set/")

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            asked.append(remote)
            shutil.copy(shards / remote.rpartition("/")[2], local)

    monkeypatch.setitem(downloads.DOWNLOADER_MAPPINGS, "s3", FakeS3)
    assert len(read_all(tmp_path / "local", remote="s3://bucket/set")) == 23
    assert asked[:3] == [f"s3://bucket/set/{name}" for name in ("dataset.json", "index.json", "shard.00000.mds.zstd")]
    with pytest.raises(ValueError, match=r"gopher://x/dataset\.json cannot be fetched: Unsupported remote"):
        ShardStore(tmp_path / "other", remote="gopher://x")


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard.*"))


def test_a_limited_copy_gives_the_same_batches_and_stays_small(shards: Path, tmp_path: Path) -> None:
    local, near = tmp_path / "local", alone(shards)
    sizes = [shard.raw.size for shard in near.record.shards]
    assert len(sizes) >= 4
    limit = 2 * max(sizes)
    far = alone(local, remote=str(shards), cache_limit=limit).read_ahead(2)
    for _ in range(15):
        first, second = next(far), next(near)
        assert torch.equal(first.sample_ids, second.sample_ids)
        assert torch.equal(first.latents, second.latents)
    far.close()
    assert 0 < held(local) <= limit
    assert not list(local.glob("*.zstd"))
    assert [each.source_id for each in iterate(local, remote=str(shards), cache_limit=limit)] == [
        each.source_id for each in read_all(shards)
    ]
    assert held(local) <= limit
    with pytest.raises(ValueError, match=rf"must hold two shards of {max(sizes)} bytes, got {max(sizes)}"):
        alone(local, remote=str(shards), cache_limit=max(sizes))


def test_what_was_not_read_for_longest_is_dropped(shards: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    whole = ShardStore(shards).record.shards
    limit = whole[0].raw.size + whole[1].raw.size + whole[2].raw.size
    store = ShardStore(local, remote=str(shards), limit=limit)
    for number in (0, 1, 2, 0, 3):
        assert store.ensure(number).is_file()
    kept = {path.name for path in local.glob("*.mds")}
    assert "shard.00001.mds" not in kept
    assert {"shard.00000.mds", "shard.00003.mds"} <= kept


def test_readers_of_one_small_copy_get_whole_shards(shards: Path, tmp_path: Path) -> None:
    expected = [(shards / shard.raw.name).read_bytes() for shard in alone(shards).record.shards]
    limit = 2 * max(map(len, expected))

    def read(seed: int) -> int:
        store, draw = ShardStore(tmp_path / "local", remote=str(shards), limit=limit), random.Random(seed)
        for _ in range(40):
            number = draw.randrange(len(expected))
            assert store.read(number, Path.read_bytes) == expected[number]
        return seed

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(read, range(3))) == [0, 1, 2]
    assert held(tmp_path / "local") <= limit


def test_a_shard_that_another_reader_drops_is_fetched_again(shards: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "local", remote=str(shards), limit=1 << 20)
    tries = itertools.count()

    def read(path: Path) -> int:
        if next(tries) < 3:
            path.unlink()
        return len(path.read_bytes())

    assert store.read(1, read) == store.record.shards[1].raw.size
    assert next(tries) == 4
    with pytest.raises(ValueError, match=r"dropped faster than it is read: data.cache_limit_gib is too small"):
        store.read(1, lambda path: path.unlink() or path.read_bytes())


def test_what_an_sdk_raises_counts_as_a_failed_fetch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_streaming()
    downloads = importlib.import_module("streaming.base.storage.download")
    sdk: Any = types.ModuleType("botocore.exceptions")
    sdk.ClientError = type("ClientError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "botocore.exceptions", sdk)
    clients = []

    class FakeS3(downloads.LocalDownloader):
        def __init__(self) -> None:
            super().__init__()
            clients.append(self)

        def _validate_remote_path(self, path: str) -> None:
            pass

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            if remote.endswith("shard.00001.mds.zstd") and len(clients) < 3:
                raise sdk.ClientError("slow down")
            shutil.copy(shards / remote.rpartition("/")[2], local)

    monkeypatch.setitem(downloads.DOWNLOADER_MAPPINGS, "s3", FakeS3)
    store = ShardStore(tmp_path / "local", remote="s3://bucket/set")
    store.ensure(0)
    assert len(clients) == 1  # one log-in serves many files
    store.ensure(1)
    assert len(clients) == 3  # a new one after each failure
    clients.clear()
    store = ShardStore(tmp_path / "other", remote="s3://bucket/set")
    monkeypatch.setattr("afd.data.store.MAX_FETCHES", 1)
    with pytest.raises(ValueError, match=r"s3://bucket/set/shard.00001.mds.zstd cannot be fetched: slow down"):
        store.ensure(1)


def test_first_use_checks_local_shards_when_they_are_read(shards: Path) -> None:
    flip_bit(shards / "shard.00003.mds.zstd")
    with pytest.raises(ValueError, match=r"shard.00003.mds.zstd is damaged"):
        alone(shards)
    loader = alone(shards, 2, verify="first_use", shuffle=False)
    for _ in range(3):
        next(loader)
    with pytest.raises(ValueError, match=r"shard.00003.mds.zstd is damaged"):
        list(itertools.islice(loader, 9))


def test_one_two_and_four_ranks_take_the_same_batches_and_swap_mid_epoch(shards: Path) -> None:
    """0 duplicates and 0 losses when the world changes size in the middle of an epoch."""
    whole = alone(shards, 4)
    expected = [next(whole).sample_ids.tolist() for _ in range(12)]
    state, seen = alone(shards, 4).state_dict(), []
    for world_size in (1, 4, 2, 4, 1, 2):
        dataset, store = alone(shards, 4)._dataset, ShardStore(shards)
        ranks = [
            ShardLoader(dataset, store, batch_size_per_rank=4 // world_size, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        for loader in ranks:
            loader.load_state_dict(state)
        for _ in range(2):
            seen.append([i for loader in ranks for i in next(loader).sample_ids.tolist()])
        (state,) = {json.dumps(loader.state_dict()): loader.state_dict() for loader in ranks}.values()
    assert seen == expected
    flat = list(itertools.chain(*seen))
    assert sorted(flat[:23]) == sorted(flat[23:46]) == list(range(23))
