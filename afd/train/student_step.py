"""One optimizer step of the student, whatever its loss: micro batches, backward, means over rows and ranks, facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd.distributed import all_reduce_mean
from afd.train.engines import Engine


def step_student(
    engine: Engine, inputs: Sequence[Tensor], loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]]
) -> dict[str, Tensor]:
    """Minimise `loss_of` once over this rank's N rows.

    Args:
        engine: the student's; its micro batch times accumulation is N.
        inputs: tensors of N rows, handed to `loss_of` a micro batch at a time.
        loss_of: returns the mean loss [] with its graph, and scalars [] to report.
    Returns:
        `student/loss` and the scalars, averaged over rows and ranks; `student/grad_norm` before clipping, `student/lr`,
        `student/skipped_steps`.
    """
    micro, count = engine.train_micro_batch_size_per_gpu(), len(inputs[0])
    totals: dict[str, Tensor] = {}
    for part in zip(*(each.split(micro) for each in inputs), strict=True):
        loss, scalars = loss_of(*part)
        engine.backward(loss)
        engine.step()
        for name, value in {"student/loss": loss, **scalars}.items():
            share = value.detach() * (len(part[0]) / count)
            totals[name] = totals[name] + share if name in totals else share
    means = all_reduce_mean(torch.stack(list(totals.values())))
    return dict(zip(totals, means, strict=True)) | engine_facts(engine, means.device)


def engine_facts(engine: Engine, device: torch.device, *, role: str = "student") -> dict[str, Tensor]:
    """`<role>/grad_norm` before clipping, `/lr` and `/skipped_steps` of an engine's last step."""
    facts = {
        f"{role}/grad_norm": float(engine.get_global_grad_norm() or 0.0),
        f"{role}/lr": float(engine.get_lr()[0]),
        f"{role}/skipped_steps": float(engine.skipped_steps),
    }
    return {name: torch.tensor(value, device=device) for name, value in facts.items()}
