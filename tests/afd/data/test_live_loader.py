"""Live parts mixed into the base order: what is delivered, what a resumed run repeats, and what never waits."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from afd.data.live_loader import LiveLoader, LiveRules, part_folder
from afd.data.loader import ShardLoader, build_loader
from afd.data.writer import write_shards

NUM_BASE = 23


@pytest.fixture(scope="module")
def new_base(_pristine_shards, tmp_path_factory):
    """Makes base loaders at their start over one StreamingDataset, on a copy: reading unpacks beside the packed."""
    base = shutil.copytree(_pristine_shards, tmp_path_factory.mktemp("base") / "shards")
    opened = build_loader(base, batch_size_per_rank=5, world_size=1, rank=0, seed=3)
    return lambda: ShardLoader(opened._dataset, opened._store, batch_size_per_rank=5, world_size=1, rank=0)


@pytest.fixture
def world(new_base, sample, tmp_path):
    """Makes loaders over one base folder and one cache, and adds parts."""

    class Live:
        cache, arrivals = tmp_path / "live", tmp_path / "live_arrivals.jsonl"

        def __init__(self):
            self.loaders = []

        def add(self, number, size=4, **changes):
            samples = [
                replace(sample(i % NUM_BASE), source_id=f"live/{number}/{i}", prompt=f"live {number}/{i}", **changes)
                for i in range(size)
            ]
            write_shards(samples, part_folder(self.cache, number), metadata={"live": True})

        def loader(self, *, check_every=2, share=None, max_wait_s=0.0, ahead=0):
            rules = LiveRules(check_every, max_wait_s, share)
            loader = LiveLoader(
                new_base(), self.cache, self.arrivals, rules, batch_size_per_rank=5, world_size=1, rank=0, seed=3
            )
            self.loaders.append(loader)
            return loader.read_ahead(ahead)

        def opened(self, loader, count):
            deadline = time.monotonic() + 20
            while loader._opener.num_open < count and time.monotonic() < deadline:
                time.sleep(0.01)
            return loader

        def plain(self):
            return new_base()

    live = Live()
    yield live
    for loader in live.loaders:
        loader.close()


def _take(loader, count):
    return [list(next(loader).prompts) for _ in range(count)]


def _take_slowly(loader, count):
    for _ in range(count):
        next(loader)
        time.sleep(0.01)


def _flat(batches):
    return [prompt for batch in batches for prompt in batch]


def test_without_parts_it_is_the_plain_loader_and_never_waits(world):
    loader, plain = world.loader(), world.plain()
    assert _take(loader, 12) == _take(plain, 12)
    assert loader.metrics() == {
        "live/samples": 0,
        "live/share": 0,
        "live/unused": 0,
        "live/wait_s": pytest.approx(0, abs=1),
    }


def test_arrivals_come_first_then_repeat_in_proportion_and_the_base_order_stays(world):
    loader = world.loader()
    first = _take(loader, 3)  # boundaries are at batches 0, 2, 4
    world.add(0)
    world.opened(loader, 1)
    same_boundary = _take(loader, 1)
    assert loader.num_live == 0
    then = _take(loader, 40)
    live = [prompt for prompt in _flat(then) if prompt.startswith("live")]
    assert live[:4] == [f"live 0/{i}" for i in range(4)]
    assert len(live) == pytest.approx(200 * 4 / 27, abs=1)
    assert all(sorted(live[i : i + 4]) == live[:4] for i in range(0, len(live) - 3, 4))  # each cycle has all
    base = [prompt for prompt in _flat(first + same_boundary + then) if not prompt.startswith("live")]
    assert base == _flat(_take(world.plain(), 45))[: len(base)]
    metrics = loader.metrics()
    assert (metrics["live/samples"], metrics["live/unused"]) == (4.0, 0.0)
    assert metrics["live/share"] == pytest.approx(4 / 27)


def test_repeats_within_a_batch_are_counted(world):
    world.add(0, size=2)
    loader = world.opened(world.loader(share=0.9), 1)
    batches = [next(loader) for _ in range(4)]
    for batch in batches:
        ids = batch.sample_ids.tolist()
        assert batch.repeats == tuple(ids[:place].count(i) for place, i in enumerate(ids))
    assert max(batches[-1].repeats) > 0


def test_a_resumed_run_repeats_what_had_arrived_and_when(world):
    loader = world.loader(share=0.5)
    batches, states = [], []
    for number in range(24):
        if number in (3, 9, 10):
            world.add(len(list(world.cache.glob("part-*"))) if world.cache.is_dir() else 0)
            world.opened(loader, len(list(world.cache.glob("part-*"))))
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.extend(_take(loader, 1))
    assert loader.num_live == 12
    assert json.loads(world.arrivals.read_text().splitlines()[2]) == {"batch": 4, "num_parts": 1}
    for number in (0, 5, 8, 9, 17):  # all parts lie there from the start now
        resumed = world.loader(share=0.5, ahead=number % 3)
        resumed.load_state_dict(states[number])
        world.opened(resumed, 3)
        assert _take(resumed, 24 - number) == batches[number:]
    assert len(world.arrivals.read_text().splitlines()) == 12


def test_share_of_one_leaves_the_base_alone(world):
    world.add(0, size=7)
    loader = world.opened(world.loader(share=1.0), 1)
    prompts = _flat(_take(loader, 14))
    assert all(prompt.startswith("live") for prompt in prompts)
    assert {prompts.count(prompt) for prompt in prompts} == {10}
    assert loader.base.num_seen == 0


def test_waiting_for_the_first_part_ends_in_time(world):
    loader = world.loader(max_wait_s=0.3, check_every=4)
    begin = time.monotonic()
    _take(loader, 4)
    assert 0.3 <= time.monotonic() - begin < 3
    assert loader.metrics()["live/wait_s"] >= 0.3


def test_what_does_not_fit_is_refused(world, sample):
    world.add(0, fps=12.0)
    loader = world.loader()
    with pytest.raises(ValueError, match=r"part-00000: latents, prompt_embeds and fps must be .* got"):
        _take_slowly(loader, 400)
    shutil.rmtree(world.cache)
    world.arrivals.unlink()
    world.add(0)
    loader = world.opened(world.loader(), 1)
    _take(loader, 1)
    state = loader.state_dict()
    shutil.rmtree(world.cache)
    world.add(0, size=5)
    with pytest.raises(ValueError, match=r"live part 0 must be .* another cache"):
        world.loader().load_state_dict(state)
    with pytest.raises(ValueError, match=r"a run without teacher\.live"):
        world.loader().load_state_dict(world.plain().state_dict())


def test_a_damaged_part_is_told(world):
    world.add(0)
    packed = next(part_folder(world.cache, 0).glob("*.zstd"))
    data = bytearray(packed.read_bytes())
    data[len(data) // 2] ^= 1
    packed.write_bytes(data)
    loader = world.loader()
    with pytest.raises(ValueError, match="damaged"):
        _take_slowly(loader, 400)
