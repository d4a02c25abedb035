"""What a teacher did not give for now is asked for again by the next preparation, and nothing else is."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import RunConfig
from afd.data.inspection import inspect
from afd.data.loader import read_all
from afd.data.schema import Sample
from afd.preparation import pipeline, prepare_shards, shard_folders
from afd.preparation.published import has_unsettled
from afd.teachers.base import SourceReject, SourceVideo, VideoRequest, accept_all
from afd.teachers.sources import open_source

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., RunConfig]


class Flaky:
    """A folder as a paid service: files in `down` fail for now, those in `refused` for good; keeps what it made."""

    def __init__(self, config: RunConfig, down: set[str], refused: set[str]) -> None:
        self.folder, self.down, self.refused = open_source(config), down, refused
        self.teacher, self.version = self.folder.teacher, self.folder.version
        self.made: list[str] = []

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Iterator[SourceVideo | SourceReject]:
        num_skipped = 0
        for given in self.folder.videos(wanted):
            if not isinstance(given, SourceVideo) or given.path is None:
                yield given
                continue
            self.made.append(given.path.name)
            if given.path.name in self.refused:
                yield SourceReject(given.source_id, "the service refused it")
            elif given.path.name in self.down:
                num_skipped += 1
                yield SourceReject(given.source_id, "the service is down", is_final=False)
            else:
                yield given
        if num_skipped:
            yield SourceReject("budget", f"{num_skipped} to go", is_final=False)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Flaky]:
    def make(config: RunConfig, down: set[str], refused: set[str] | None = None) -> Flaky:
        source = Flaky(config, down, refused or set())
        monkeypatch.setattr(pipeline, "open_split_source", lambda _: (source, None))
        return source

    return make


def read_both(config: RunConfig) -> list[list[Sample]]:
    return [read_all(folder) for folder in shard_folders(config)]


def reject_rows(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shard_folders(config)[0] / "rejects.jsonl").read_text().splitlines()]


def names(numbers: list[int]) -> set[str]:
    return {f"{number:04}.mp4" for number in numbers}


def test_the_next_preparation_asks_for_the_transient_failures_alone(
    folder_of_videos: MakeFolder, config_for: MakeConfig, flaky: Callable[..., Flaky]
) -> None:
    videos = folder_of_videos(20)
    (videos / "uncaptioned.mp4").write_bytes(b"x")
    config = config_for(videos, "prepare.heldout_fraction=0.4", "prepare.shard_mib=0.04", "prepare.batch_size=3")
    source = flaky(config, names([3, 7, 8, 15]), names([5]))
    prepare_shards(config)
    first, made = read_both(config), sorted(source.made)
    assert made == sorted(names(list(range(20))))
    assert [row["source_id"] for row in reject_rows(config) if row.get("is_final") is False][-1] == "budget"
    assert len(reject_rows(config)) == 4 + 1 + 1 + 1
    assert has_unsettled(shard_folders(config)[0])

    source.made.clear()
    assert prepare_shards(config) == {}  # as a run does that resumes: its data stays
    assert source.made == []
    source.down = names([8])
    written = prepare_shards(config, retry=True)
    assert sorted(source.made) == sorted(names([3, 7, 8, 15]))
    second = read_both(config)
    for before, after in zip(first, second, strict=True):
        assert [each.source_id for each in after[: len(before)]] == [each.source_id for each in before]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(before, after, strict=False))
    assert sum(map(len, second)) == 18
    assert written["train"].num_samples == len(second[0])
    assert len(reject_rows(config)) == 1 + 1 + 1 + 1

    source.made.clear()
    source.down = set()
    prepare_shards(config, retry=True)
    assert source.made == ["0008.mp4"]
    assert sorted(row["reason"] for row in reject_rows(config)) == ["missing caption", "the service refused it"]
    source.made.clear()
    assert prepare_shards(config, retry=True) == {}
    assert source.made == []
    assert all(inspect(folder).problems == () for folder in shard_folders(config))

    whole = config_for(videos, "prepare.heldout_fraction=0.4", f"output_dir={config.output_dir}-whole")
    flaky(whole, set(), names([5]))
    prepare_shards(whole)
    for once, thrice in zip(read_both(whole), read_both(config), strict=True):
        alike = {each.source_id: each.latents for each in thrice}
        assert alike.keys() == {each.source_id for each in once}
        assert all(torch.equal(each.latents, alike[each.source_id]) for each in once)


def test_a_retry_that_dies_before_it_is_in_place_goes_on(
    folder_of_videos: MakeFolder, config_for: MakeConfig, flaky: Callable[..., Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(folder_of_videos(12), "prepare.batch_size=2", "prepare.heldout_fraction=0.4")
    source = flaky(config, names([1, 2, 6, 9, 10]))
    prepare_shards(config)
    source.down = set()
    plain, count = pipeline._Preparation._note, iter(range(100))

    def die(self: Any, event: Any) -> None:
        plain(self, event)
        if next(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Preparation, "_note", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config, retry=True)
    before = read_both(config)
    assert sum(map(len, before)) == 7  # what is in place is whole all the while
    assert prepare_shards(config) == {}

    first, plain_publish = True, pipeline.publish

    def die_between(folder: Path, out: Path) -> None:
        nonlocal first
        if not first:
            raise KeyboardInterrupt
        first = False
        plain_publish(folder, out)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", die_between)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config, retry=True)
    prepare_shards(config, retry=True)
    after = read_both(config)
    assert sum(map(len, after)) == 12
    assert len({each.source_id for part in after for each in part}) == 12
    assert reject_rows(config) == []
    assert sorted(path.name for path in shard_folders(config)[0].parent.iterdir()) == ["heldout", "train"]


def test_a_video_that_comes_later_is_still_a_duplicate(
    folder_of_videos: MakeFolder, config_for: MakeConfig, flaky: Callable[..., Flaky]
) -> None:
    videos = folder_of_videos(8)
    shutil.copy(videos / "0002.mp4", videos / "0006.mp4")
    config = config_for(videos)
    source = flaky(config, names([6]))
    prepare_shards(config)
    source.down = set()
    prepare_shards(config, retry=True)
    (row,) = reject_rows(config)
    assert row["reason"].startswith("the same video as ")
    assert sum(map(len, read_both(config))) == 7


def test_nothing_at_all_is_asked_for_again(
    folder_of_videos: MakeFolder, config_for: MakeConfig, flaky: Callable[..., Flaky]
) -> None:
    config = config_for(folder_of_videos(6))
    source = flaky(config, names(list(range(6))))
    with pytest.raises(ValueError, match=r"no sample to write to .*the service is down"):
        prepare_shards(config)
    source.down = set()
    prepare_shards(config)
    assert sum(map(len, read_both(config))) == 6
