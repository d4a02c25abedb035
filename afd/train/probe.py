"""The discriminator's scores on a small set of clips that never changes: what moved is D, not the student.

The set pairs held-out prompts' teacher clips with the initial student's rollouts, neither of which D is trained on.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd.distributed import World, gather_cat
from afd.evaluation.heldout import HeldoutEvaluator
from afd.train.discriminator_update import score
from afd.train.engines import Engine, gathered
from afd.train.objectives import Roles
from afd.types import VideoBatch

logger = logging.getLogger(__name__)


def shared_rows(count: int, world: World) -> list[int]:
    """This rank's rows of `count`: as many on every rank, in rank order, the surplus at the end repeating the first."""
    share = -(-count // world.size)
    return [(world.rank * share + i) % count for i in range(share)]


@dataclass(frozen=True)
class ProbeSet:
    """This rank's rows of the set, as the discriminator's view shows them, on the CPU.

    Attributes:
        count: pairs on all ranks.
        real, fake: [rows, ...] teacher clips and the initial student's.
        condition: [rows, ...].
        ids: one for each of the `count` pairs, of its prompt and teacher clip, the same on every rank.
    """

    count: int
    real: Tensor
    fake: Tensor
    condition: Tensor
    ids: tuple[str, ...]

    def margins(self, engine: Engine, device: torch.device) -> Tensor:
        """Teacher's minus student's score [count] of every pair, on every rank, without gradient; collective."""
        condition = self.condition.to(device)
        real, fake = (score(engine, clips.to(device), condition) for clips in (self.real, self.fake))
        return gather_cat(real - fake)[: self.count]


def pair_ids(batch: VideoBatch, count: int) -> tuple[str, ...]:
    """What a pair is known by after a resume: a digest of its prompt and teacher clip, for the first `count` rows."""
    clips = (clip.contiguous().cpu().numpy().data for clip in batch.latents[:count])
    texts = (prompt.encode() + b"\0" for prompt in batch.prompts)
    return tuple(hashlib.sha256(b"".join(each)).hexdigest()[:16] for each in zip(texts, clips, strict=False))


def make_probe_set(roles: Roles, evaluator: HeldoutEvaluator, *, num_pairs: int, world: World) -> ProbeSet:
    """Roll the initial student out on held-out prompts, with the evaluation's own noise; collective.

    Args:
        roles: its reference average is the initial student.
        evaluator: the held-out prompts with their teacher clips.
        num_pairs: at most as many as there are held-out clips.
        world: this process's place.
    """
    batch = evaluator.batch
    count = min(num_pairs, len(batch.prompts))
    rows = shared_rows(count, world)
    with torch.no_grad(), roles.reference.applied(), gathered(roles.student) as student:
        fake = evaluator.sample(student, [(row, 0) for row in rows])
    prompts, embeds = [batch.prompts[row] for row in rows], batch.prompt_embeds[rows]
    real, condition = roles.view(batch.latents[rows], prompts, embeds)
    fake, _ = roles.view(fake, prompts, embeds)
    return ProbeSet(count, real.cpu(), fake.cpu(), condition.cpu(), pair_ids(batch, count))


class DiscriminatorProbe:
    """Measures a probe set now and then, and remembers the first measurement."""

    def __init__(self, pairs: ProbeSet, earlier: dict[str, Any] | list[float] | None = None) -> None:
        """earlier: `state_dict` of an earlier process, or its first margins alone, as older commits have them.

        Margins of other pairs are dropped, which is logged: the next measurement is then the first.
        """
        self.pairs = pairs
        known = {"first": earlier} if isinstance(earlier, list) else earlier or {}
        self.first: list[float] | None = known.get("first")
        ids = known.get("ids", pairs.ids)
        if self.first is not None and (len(self.first) != pairs.count or tuple(ids) != pairs.ids):
            logger.info(
                "the probe set is another one than before (%d pairs, now %d): its drift counts from here",
                len(self.first),
                pairs.count,
            )
            self.first = None

    def state_dict(self) -> dict[str, Any]:
        """The first measurement, and of which pairs."""
        return {"first": self.first, "ids": list(self.pairs.ids)}

    def measure(self, engine: Engine, device: torch.device) -> dict[str, float]:
        """The discriminator on the set.

        Returns:
            `discriminator/probe_accuracy` (share of pairs ranked right, ties one half), `/probe_margin` (mean teacher
            score minus student score), `/probe_drift` (root mean square change of the pairs' margins since the first
            measurement; margins, because a Bradley-Terry score is only known up to a constant per prompt).
        """
        margins = self.pairs.margins(engine, device).double().cpu()
        if self.first is None:
            self.first = margins.tolist()
        change = margins - torch.tensor(self.first, dtype=torch.float64)
        accuracy = (margins > 0).double() + 0.5 * (margins == 0).double()
        return {
            "discriminator/probe_accuracy": accuracy.mean().item(),
            "discriminator/probe_margin": margins.mean().item(),
            "discriminator/probe_drift": change.square().mean().sqrt().item(),
        }
