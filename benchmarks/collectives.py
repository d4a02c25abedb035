"""Counts what collectives hand over, in the process that runs them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 256


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors of every collective inside the mode: "phase operation" -> [calls, bytes].

    Set `phase` before the work. `small` holds the all-reduces below 256 bytes by phase, [calls, bytes]: norms, metrics.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.counts: dict[str, list[int]] = {}
        self.small: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and "barrier" not in name:
            # A gather's first argument is its output, a reduce-scatter's second its input: both the whole tensor.
            whole = args[1] if "reduce_scatter" in name else args[0]
            tensors = whole if isinstance(whole, (list, tuple)) else [whole]
            flat = [each for part in tensors for each in (part if isinstance(part, (list, tuple)) else [part])]
            size = sum(each.numel() * each.element_size() for each in flat)
            entry = self.counts.setdefault(f"{self.phase} {name}", [0, 0])
            entry[0] += 1
            entry[1] += size
            if "allreduce" in name and size < _SMALL:
                few = self.small.setdefault(self.phase, [0, 0])
                few[0] += 1
                few[1] += size
        return func(*args, **(kwargs or {}))

    def bulk(self, phase: str) -> dict[str, list[int]]:
        """A phase's bulk collectives by the planner's names: [calls, bytes]."""
        names = {
            "_allgather_base_": "all_gather",
            "_reduce_scatter_base_": "reduce_scatter",
            "allreduce_": "all_reduce",
        }
        found = {kind: [*self.counts.get(f"{phase} c10d::{name}", [0, 0])] for name, kind in names.items()}
        small = self.small.get(phase, [0, 0])
        found["all_reduce"] = [all_ - few for all_, few in zip(found["all_reduce"], small, strict=True)]
        return found
