"""What `afd verify` finds and `afd merge` puts together."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data import writer
from afd.data.inspection import inspect, merge, read_folder, read_rows
from afd.data.loader import read_all
from afd.data.mds import decode_row, encode_row
from afd.data.schema import Sample, to_row
from afd.data.writer import write_shards


def test_a_good_folder_has_no_problems_and_reads_as_the_loader_reads_it(shards: Path) -> None:
    found = inspect(shards)
    assert (found.num_samples, found.problems) == (23, ())
    assert found.num_shards == len(found.record.shards)
    assert not list(shards.glob("*.mds"))  # nothing was unpacked
    for first, second in zip(read_folder(shards), read_all(shards), strict=True):
        assert torch.equal(first.latents, second.latents)
        assert dataclasses.replace(first, latents=second.latents, prompt_embeds=second.prompt_embeds) == second


def test_single_rows_are_read_from_their_shards_alone(shards: Path) -> None:
    whole = [sample.source_id for sample in read_folder(shards)]
    assert [sample.source_id for sample in read_rows(shards, {0, 7, 22})] == [whole[i] for i in (0, 7, 22)]
    (shards / "shard.00001.mds.zstd").unlink()
    assert [sample.source_id for sample in read_rows(shards, {22, 0})] == [whole[0], whole[22]]


def test_every_problem_is_named_by_shard_and_row(
    tmp_path: Path, sample: Callable[[int], Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        0: {"latents": sample(0).latents * float("nan")},
        1: {"latents": sample(1).latents * 1e4},
        2: {"prompt_embeds": sample(2).prompt_embeds * 0},
        3: {"sha256": "abc"},
        5: {"motion": 7.0},
        6: {"source_id": "physics/4"},
    }

    def unchecked(each: Sample) -> dict[str, Any]:
        row = to_row(sample(0))
        return {**row, **{name: getattr(each, name) for name in row if hasattr(each, name) and name != "video_mp4"}}

    monkeypatch.setattr(writer, "to_row", unchecked)
    samples = [dataclasses.replace(sample(i), sha256="0" * 64) for i in range(8)]
    samples = [dataclasses.replace(each, **bad.get(i, {})) for i, each in enumerate(samples)]
    with pytest.raises(ValueError, match="must be unique"):
        write_shards(samples, tmp_path / "shards", metadata={})
    samples[6] = dataclasses.replace(samples[6], source_id="physics/four")
    path = write_shards(samples, tmp_path / "shards", metadata={}).path
    problems = inspect(path).problems
    expected = ["latents has NaN", "latents must lie within", "zero everywhere", "sha256 must be 64", "motion must be"]
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem
        assert problem.startswith("shard.00000.mds.zstd row ")


def test_damage_is_found_in_every_shard_at_once(shards: Path) -> None:
    for name in ("shard.00000.mds.zstd", "shard.00002.mds.zstd"):
        data = bytearray((shards / name).read_bytes())
        data[-9] ^= 4
        (shards / name).write_bytes(bytes(data))
    problems = inspect(shards).problems
    assert len(problems) == 3
    assert "shard.00000.mds.zstd is damaged" in problems[0]
    assert "shard.00002.mds.zstd is damaged" in problems[1]
    assert "23 samples are promised" in problems[2]


def test_rows_that_do_not_add_up_are_refused(sample: Callable[[int], Sample]) -> None:
    data = encode_row(to_row(sample(1)))
    assert decode_row(data)["prompt"] == sample(1).prompt
    for broken in (data[:-1], data + b"x", b"", data[:3]):
        with pytest.raises(ValueError, match=r"row|number|column"):
            decode_row(broken)


def test_merging_keeps_the_order_and_drops_what_came_before(
    shards: Path, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    renamed = dataclasses.replace(sample(3), source_id="another name")
    other = write_shards([sample(100), sample(5), renamed], tmp_path / "other", metadata={}).path
    described = json.loads((shards / "dataset.json").read_text())
    summary = merge([shards, other], tmp_path / "all", shard_bytes=5000)
    assert [each.source_id for each in read_all(summary.path)] == [f"physics/{i}" for i in [*range(23), 100]]
    assert [reject.source_id for reject in summary.rejects] == ["physics/5", "another name"]
    assert inspect(summary.path).problems == ()
    merged = json.loads((summary.path / "dataset.json").read_text())["metadata"]["merged"]
    assert merged[0]["fingerprint"] == described["fingerprint"]


def test_folders_that_do_not_fit_are_not_merged(shards: Path, tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    slower = write_shards([dataclasses.replace(sample(50), fps=5.0)], tmp_path / "slower", metadata={}).path
    with pytest.raises(ValueError, match=r"slower: fps must be 10.0 as in .*, got 5.0"):
        merge([shards, slower], tmp_path / "all")
    settings = {"encoders": {"codec": "wan_vae"}}
    coded = write_shards([sample(50)], tmp_path / "coded", metadata=settings).path
    with pytest.raises(ValueError, match="encoders settings must be None"):
        merge([shards, coded], tmp_path / "all")
    with pytest.raises(ValueError, match="at least two folders"):
        merge([shards], tmp_path / "all")
    assert not (tmp_path / "all").exists()
