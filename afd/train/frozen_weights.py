"""A digest of the weights that a run stands on and never moves: commits leave them out, a resume must find them again.

Adapters, heads and their Adam moments mean nothing on another base. The digest is of the weights, not of their file:
a file that was moved, or the same weights in another format, is the same base.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from afd.distributed import gather_objects
from afd.models.lora import is_old_adapter
from afd.train.averaging import ParameterAverage
from afd.train.engines import Engine, bare_module, own_share, zero_stage

_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""By module or average: hashed once a process, because they do not move."""


def frozen_digests(engines: Mapping[str, Engine], fixed: Mapping[str, ParameterAverage]) -> dict[str, str]:
    """Digests of engines' frozen parameters and of averages that are not saved; collective, the ranks share the work.

    Args:
        engines: by role; those that train everything are left out.
        fixed: averages of decay 1 that no commit holds, by name.
    Returns:
        Hexadecimal, by role or name. Comparable between the same ZeRO stage, dtype and number of ranks.
    """
    digests: dict[str, str] = {}
    for role, engine in engines.items():
        module = bare_module(engine)
        if module not in _DIGESTS:
            own = _own_frozen(engine)
            if own is None:
                continue
            _DIGESTS[module] = _digest(own)
        digests[role] = _DIGESTS[module]
    for name, average in fixed.items():
        if average not in _DIGESTS:
            _DIGESTS[average] = _digest(average.own_parts())
        digests[name] = _DIGESTS[average]
    return digests


def frozen_problem(saved: Mapping[str, str], own: Mapping[str, str]) -> str | None:
    """What differs between a commit's digests and a run's, or None; what only one of them has is not compared."""
    for name in own:
        if name in saved and saved[name] != own[name]:
            return (
                f"was trained on other frozen weights of {name} (SHA-256 {saved[name][:12]}, this run's "
                f"{own[name][:12]}): start from the same weights (student.init_from, dmd.real_score, "
                "discriminator.vlm), or choose another output_dir"
            )
    return None


def _own_frozen(engine: Engine) -> list[tuple[str, Tensor]] | None:
    """This rank's share of the frozen parameters; None without any."""
    parameters: dict[str, Any] = dict(bare_module(engine).named_parameters())
    frozen = {name: each for name, each in parameters.items() if not (each.requires_grad or is_old_adapter(name))}
    if not frozen:
        return None
    is_sharded = zero_stage(engine) == 3
    parts = {name: each.ds_tensor.data if is_sharded else each.detach() for name, each in frozen.items()}
    return own_share(frozen, parts, is_sharded=is_sharded)


def _digest(own: Iterable[tuple[str, Tensor]]) -> str:
    """One digest over all ranks' parts; collective."""
    mine = hashlib.sha256()
    for name, tensor in own:
        mine.update(f"{name} {tensor.dtype} {tensor.numel()}\n".encode())
        mine.update(tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return hashlib.sha256("".join(gather_objects(mine.hexdigest())).encode()).hexdigest()
