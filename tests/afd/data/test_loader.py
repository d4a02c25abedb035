"""Order, resumption, world size, and the neighbours of a run on one machine."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data.loader import ShardLoader, build_loader, read_all, to_batch
from afd.data.schema import Sample, load_streaming
from afd.data.writer import write_shards

WORKER = Path(__file__).with_name("loader_worker.py")
HOLDER = Path(__file__).with_name("loader_holder.py")


def alone(shards: Path, batch_size: int = 4, *, seed: int = 3, **options: Any) -> ShardLoader:
    return build_loader(shards, batch_size_per_rank=batch_size, world_size=1, rank=0, seed=seed, **options)


def take_ids(loader: ShardLoader, num_batches: int) -> list[list[int]]:
    return [next(loader).sample_ids.tolist() for _ in range(num_batches)]


def test_batch_is_float32_in_the_order_of_its_ids(shards: Path, sample: Callable[[int], Sample]) -> None:
    batch = next(alone(shards))
    assert batch.latents.shape == (4, 3, 5, 7, 2)
    assert batch.prompt_embeds.shape == (4, 6, 9)
    assert {batch.latents.dtype, batch.prompt_embeds.dtype} == {torch.float32}
    for row, i in enumerate(batch.sample_ids.tolist()):
        assert batch.prompts[row] == sample(i).prompt
        assert torch.equal(batch.latents[row], sample(i).latents.float())
        assert torch.equal(batch.prompt_embeds[row], sample(i).prompt_embeds.float())


def test_every_epoch_holds_every_sample_once_in_a_new_order(shards: Path) -> None:
    ids = list(itertools.chain(*take_ids(alone(shards), 23)))  # 92 ids: 4 epochs
    epochs = [ids[begin : begin + 23] for begin in range(0, 92, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids == list(itertools.chain(*take_ids(alone(shards), 23)))
    assert ids != list(itertools.chain(*take_ids(alone(shards, seed=4), 23)))
    assert list(itertools.chain(*take_ids(alone(shards, shuffle=False), 6))) == [*range(23), 0]


def test_a_sample_that_falls_twice_into_a_global_batch_is_told_apart_on_any_number_of_ranks(shards: Path) -> None:
    opened = alone(shards)
    one, *two = (
        ShardLoader(opened._dataset, opened._store, batch_size_per_rank=20 // size, world_size=size, rank=rank)
        for size, rank in ((1, 0), (2, 0), (2, 1))
    )
    for loader in (one, *two):
        assert not any(next(loader).repeats), "the first 20 of 23 samples"
    whole, parts = next(one), [next(loader) for loader in two]
    ids = whole.sample_ids.tolist()
    assert len(set(ids)) < 20
    assert whole.repeats == tuple(ids[:place].count(i) for place, i in enumerate(ids))
    assert whole.repeats == parts[0].repeats + parts[1].repeats
    keys = whole.seed_keys(2)
    assert keys == parts[0].seed_keys(2) + parts[1].seed_keys(2)
    assert len(set(keys)) == 40
    first = [(i, g) for i, repeat in zip(ids, whole.repeats, strict=True) if not repeat for g in range(2)]
    assert [key for key in keys if len(key) == 2] == first, "random streams of all others stay as they were"


def test_order_is_the_one_streaming_draws(shards: Path) -> None:
    dataset = load_streaming().StreamingDataset(
        local=str(shards), batch_size=4, shuffle=True, shuffle_seed=3, num_canonical_nodes=1, shuffle_block_size=1 << 18
    )
    expected = [int(row["source_id"].split("/")[1]) for row in dataset]
    assert list(itertools.chain(*take_ids(alone(shards), 6)))[:23] == expected


@pytest.mark.parametrize("num_batches", [0, 3, 6, 11])
def test_resume_mid_epoch_continues_exactly(shards: Path, num_batches: int) -> None:
    loader = alone(shards)
    take_ids(loader, num_batches)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = take_ids(loader, 9)
    resumed = alone(shards).read_ahead(2)
    resumed.load_state_dict(state)
    assert take_ids(resumed, 9) == rest
    assert resumed.state_dict() == loader.state_dict()
    wider = alone(shards, 12)
    wider.load_state_dict(state)
    assert take_ids(wider, 3) == [list(itertools.chain(*rest[begin : begin + 3])) for begin in (0, 3, 6)]


def test_reading_ahead_changes_neither_batches_nor_state(shards: Path) -> None:
    plain, ahead = alone(shards), alone(shards).read_ahead(3)
    for _ in range(8):
        first, second = next(plain), next(ahead)
        assert torch.equal(first.latents, second.latents)
        assert plain.state_dict() == ahead.state_dict()
    ahead.close()
    assert torch.equal(next(plain).sample_ids, next(ahead).sample_ids)
    ahead.close()


@pytest.mark.slow
def test_fresh_process_resumes_with_exactly_the_rest(shards: Path, launch: Any, tmp_path: Path) -> None:
    loader = alone(shards, 4)
    seen = take_ids(loader, 3)
    (tmp_path / "state.json").write_text(json.dumps(loader.state_dict()))
    resumed = launch(WORKER, str(shards), "4", "3", "--state", str(tmp_path / "state.json"), launcher="plain")
    assert resumed["batches"] == take_ids(loader, 3)
    epoch = list(itertools.chain(*seen, *resumed["batches"]))[:23]
    assert sorted(epoch) == list(range(23))


@pytest.mark.slow
def test_two_ranks_see_the_global_batches_of_one(shards: Path, launch: Any, tmp_path: Path) -> None:
    loader = alone(shards, 6)
    (tmp_path / "state.json").write_text(json.dumps(loader.state_dict()))
    two = launch(WORKER, str(shards), "6", "5", "--state", str(tmp_path / "state.json"), ranks=2)
    assert two["batches"] == take_ids(loader, 5)
    assert two["state"] == loader.state_dict()


@pytest.mark.slow
def test_four_ranks_under_the_deepspeed_launcher_see_the_same(shards: Path, launch: Any) -> None:
    four = launch(WORKER, str(shards), "8", "5", ranks=4, launcher="deepspeed")
    assert four["batches"] == take_ids(alone(shards, 8), 5)


@pytest.mark.slow
def test_runs_side_by_side_and_a_killed_run_do_not_disturb(shards: Path) -> None:
    command, pipe = [sys.executable, str(HOLDER), str(shards)], subprocess.PIPE
    runs = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        first = take_ids(alone(shards), 2)
        lines = [run.stdout.readline() for run in runs if run.stdout]
        assert [json.loads(line) for line in lines] == [first, first]
        runs[0].send_signal(signal.SIGKILL)
        runs[0].wait(timeout=30)
        assert take_ids(alone(shards), 2) == first
        out, _ = runs[1].communicate(timeout=60)
        assert json.loads(out) == take_ids(alone(shards), 5)[2:]
    finally:
        for run in runs:
            run.kill()
            run.wait(timeout=30)
            if run.stdout:
                run.stdout.close()


def test_state_of_another_run_is_refused(shards: Path, tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    state = alone(shards).state_dict()
    with pytest.raises(ValueError, match="shuffle_seed must be 4, got 3"):
        alone(shards, seed=4).load_state_dict(state)
    other = write_shards([sample(i + 100) for i in range(23)], tmp_path / "other", metadata={}).path
    with pytest.raises(ValueError, match="state is of another run: content"):
        alone(other).load_state_dict(state)
    with pytest.raises(ValueError, match="loader state lacks epoch"):
        alone(shards).load_state_dict({"sample_in_epoch": 3})
    with pytest.raises(ValueError, match="must lie within an epoch"):
        alone(shards).load_state_dict({**state, "sample_in_epoch": 23})


def test_impossible_requests_are_explained(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one global batch of 24 x 1 ranks, got 23 samples"):
        alone(shards, 24)
    with pytest.raises(ValueError, match="rank 1 of world_size 2 needs a process group"):
        build_loader(shards, batch_size_per_rank=1, world_size=2, rank=1, seed=0)
    with pytest.raises(ValueError, match="batch_size_per_rank >= 1"):
        alone(shards, 0)


def test_cache_folder_leaves_the_shards_untouched(shards: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(shards))
    first = alone(shards, cache=tmp_path / "cache")
    assert sorted(os.listdir(shards)) == before
    again = alone(shards, cache=tmp_path / "cache")
    assert take_ids(first, 3) == take_ids(again, 3) == take_ids(alone(shards), 3)
    assert len(os.listdir(tmp_path / "cache")) == 1
    assert first.state_dict() == again.state_dict()


def test_read_all_returns_the_samples_in_order(shards: Path, sample: Callable[[int], Sample]) -> None:
    samples = read_all(shards)
    assert [each.source_id for each in samples] == [f"physics/{i}" for i in range(23)]
    assert [each.video_mp4 for each in samples] == [sample(i).video_mp4 for i in range(23)]
    batch = to_batch(samples)
    assert batch.sample_ids.tolist() == list(range(23))
    assert torch.equal(batch.latents[5], sample(5).latents.float())
    assert len(read_all(shards, limit=3)) == 3
