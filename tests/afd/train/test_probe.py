"""The probe set: what it says of a discriminator whose margins are known, and how ranks share it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.distributed import World, seeded_generator
from afd.train.probe import DiscriminatorProbe, ProbeSet, pair_ids, shared_rows
from afd.types import VideoBatch

CPU = torch.device("cpu")


class LinearEngine:
    """D(x, y) = a . x, two clips at a time."""

    def __init__(self) -> None:
        self.a = torch.randn(12, generator=seeded_generator(0), dtype=torch.float64)

    def __call__(self, clips: Tensor, condition: Tensor) -> Tensor:
        return clips.flatten(1).double() @ self.a + 7 * condition.double().sum(dim=1)

    def train_micro_batch_size_per_gpu(self) -> int:
        return 1


def make_pairs(count: int = 5) -> ProbeSet:
    real, fake = (torch.randn(count, 3, 4, generator=seeded_generator(i), dtype=torch.float64) for i in (1, 2))
    ids = tuple(f"pair {i}" for i in range(count))
    return ProbeSet(count, real, fake, torch.randn(count, 2, generator=seeded_generator(3)), ids)


def test_drift_is_the_change_of_known_margins_since_the_first_measurement() -> None:
    engine: Any = LinearEngine()
    pairs = make_pairs()
    probe = DiscriminatorProbe(pairs)
    difference = (pairs.real - pairs.fake).flatten(1)
    before = difference @ engine.a
    first = probe.measure(engine, CPU)
    assert first["discriminator/probe_drift"] == 0.0
    assert first["discriminator/probe_margin"] == pytest.approx(before.mean().item())
    assert first["discriminator/probe_accuracy"] == (before > 0).double().mean().item()
    assert probe.measure(engine, CPU) == first, "a frozen discriminator does not drift"
    change = torch.randn(12, generator=seeded_generator(4), dtype=torch.float64)
    engine.a += change
    later = probe.measure(engine, CPU)
    assert later["discriminator/probe_drift"] == pytest.approx((difference @ change).square().mean().sqrt().item())
    for earlier in (probe.state_dict(), probe.first):  # older commits hold the margins alone
        assert DiscriminatorProbe(pairs, earlier).measure(engine, CPU) == later


@pytest.mark.parametrize("count", [1, 4, 5])
def test_margins_of_another_set_are_no_start_for_drift(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """One pair's margin would broadcast over eight in silence, and four against eight is no drift either."""
    engine: Any = LinearEngine()
    before = DiscriminatorProbe(make_pairs())
    before.measure(engine, CPU)
    engine.a += 1
    pairs = make_pairs(count)
    other = dataclasses.replace(pairs, ids=tuple(reversed(pairs.ids)) if count == 5 else pairs.ids)
    with caplog.at_level("INFO"):
        resumed = DiscriminatorProbe(other, before.state_dict())
    assert f"another one than before (5 pairs, now {count}): its drift counts from here" in caplog.text
    assert resumed.first is None
    assert resumed.measure(engine, CPU)["discriminator/probe_drift"] == 0.0
    assert resumed.first is not None
    assert len(resumed.first) == count


def test_pairs_are_known_by_prompt_and_clip() -> None:
    latents = torch.randn(3, 2, 4, 4, 4, generator=seeded_generator(5))
    batch = VideoBatch(torch.arange(3), ("a", "b", "c"), latents, torch.zeros(3, 2, 2))
    ids = pair_ids(batch, 2)
    assert ids == pair_ids(batch, 3)[:2]
    assert len({*ids, *pair_ids(dataclasses.replace(batch, prompts=("a", "d", "c")), 2)}) == 3
    assert len({*ids, *pair_ids(dataclasses.replace(batch, latents=latents + 1), 2)}) == 4


def test_a_constant_per_prompt_is_no_drift() -> None:
    engine: Any = LinearEngine()
    probe = DiscriminatorProbe(make_pairs())
    probe.measure(engine, CPU)
    probe.pairs = dataclasses.replace(probe.pairs, condition=probe.pairs.condition + 1)
    assert probe.measure(engine, CPU)["discriminator/probe_drift"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_rows_evenly_and_in_order(count: int, size: int) -> None:
    shares = [shared_rows(count, World(rank, rank, size, CPU)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1, "a forward on one rank needs one on every rank"
    assert [row for share in shares for row in share][:count] == list(range(count))
