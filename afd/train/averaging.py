"""Moving averages of an engine's trainable parameters: the EMA, the old policy and the frozen reference in one class.

Under ZeRO-3 each rank averages its own float32 shard: no update and no swap ever gathers a parameter. Otherwise the
whole parameters are averaged. Which average is used for what belongs to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from afd.train.engines import (
    Engine,
    bare_module,
    gather_shards,
    local_shard,
    own_share,
    release_gathered,
    shard_slice,
    zero_stage,
)

Decay = float | Callable[[int], float]

# Modules whose parameters hold an average at the moment, with that average's name.
_APPLIED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def decay_none(step: int) -> float:
    """No memory: the average is the current student. Source: DiffusionNFT scripts/train_nft_sd3.py, decay type 0."""
    return 0.0


def decay_ramp_to_half(step: int) -> float:
    """min(0.001 step, 0.5). Source: DiffusionNFT scripts/train_nft_sd3.py, decay type 1."""
    return min(0.001 * step, 0.5)


def decay_after_75(step: int) -> float:
    """0 for the first 75 steps, then min(0.0075 (step - 75), 0.999). Source: as above, decay type 2."""
    return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)


class ParameterAverage:
    """average <- decay * average + (1 - decay) * parameter, per optimizer step; starts as a copy of the parameters.

    Only trainable parameters are averaged, so with LoRA that is the adapter. A decay of 1.0 is a frozen reference.

    Args:
        engine_or_module: a DeepSpeed engine of stage 0 to 3, or a plain module.
        decay: in [0, 1], or a schedule from the step (number of optimizer steps done) to such a number.
        name: what messages and checkpoints call it.
        twin: from a trained parameter's name to that of a frozen one of the same shape, which always holds the average
            in the parameters' dtype; None for no such copy.
    Raises:
        ValueError: decay outside [0, 1], nothing to train, or ZeRO-3 with persistent parameters, whose gathered
            copies a swap would miss: set "stage3_param_persistence_threshold" to 0.
    """

    def __init__(
        self,
        engine_or_module: Engine | nn.Module,
        *,
        decay: Decay,
        name: str,
        twin: Callable[[str], str] | None = None,
    ) -> None:
        if not callable(decay):
            _check_decay(decay, name)
        self.name = name
        self._decay = decay
        self._owner: Any = engine_or_module
        self._sharded = zero_stage(engine_or_module) == 3
        parameters: dict[str, Any] = dict(bare_module(engine_or_module).named_parameters())
        self._parameters = {key: each for key, each in parameters.items() if each.requires_grad}
        if not self._parameters:
            raise ValueError(f"average {name!r} needs at least one parameter that requires a gradient")
        if self._sharded and any(each.ds_persist for each in parameters.values()):
            raise ValueError(
                f"average {name!r} needs no persistent ZeRO-3 parameters: "
                'set "stage3_param_persistence_threshold": 0 in "zero_optimization"'
            )
        self._twins = [parameters[twin(key)] for key in self._parameters] if twin is not None else []
        self._average = [source.float().clone() for source in self._sources()]
        self._write_twins()

    def _sources(self) -> list[Tensor]:
        """The live values, float32 or the parameter's dtype: shards under ZeRO-3, whole parameters otherwise."""
        if self._sharded:
            return [local_shard(each) for each in self._parameters.values()]
        return [each.detach() for each in self._parameters.values()]

    def _slots(self) -> list[Tensor]:
        """What the next forward reads, to be written in place."""
        return [(each.ds_tensor if self._sharded else each).data for each in self._parameters.values()]

    @torch.no_grad()
    def _write_twins(self) -> None:
        if self._twins:
            self._release()
            slots: list[Tensor] = [(each.ds_tensor if self._sharded else each).data for each in self._twins]
            torch._foreach_copy_(slots, self._average)
            for each in self._twins:
                if self._sharded and each.ds_secondary_tensor is not None:
                    each.ds_secondary_tensor = None  # hpZ's copy: DeepSpeed renews those of trained parameters only

    @torch.no_grad()
    def update(self, step: int) -> float:
        """Move towards the current parameters; returns the decay used.

        Args:
            step: optimizer steps done so far; what a schedule sees.
        Raises:
            ValueError: the schedule left [0, 1], or an average is applied just now.
        """
        if bare_module(self._owner) in _APPLIED:
            raise ValueError(f"average {self.name!r} cannot be updated while an average is applied")
        decay = self._decay(step) if callable(self._decay) else self._decay
        _check_decay(decay, self.name)
        if decay < 1.0:
            sources = [source.to(slot.dtype) for source, slot in zip(self._sources(), self._average, strict=True)]
            torch._foreach_lerp_(self._average, sources, 1.0 - decay)
            self._write_twins()
        return decay

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run forwards with the averaged parameters; the originals come back bit for bit, after exceptions too.

        No collective happens here. To gather for a rollout, enter `gathered(engine)` inside, never outside. Not
        between a forward and its backward.

        Raises:
            ValueError: nested, or inside `gathered(engine)`.
        """
        owner = bare_module(self._owner)
        if owner in _APPLIED:
            raise ValueError(f"average {self.name!r} cannot be applied inside average {_APPLIED[owner]!r}")
        self._release()
        slots = self._slots()
        originals = [slot.clone() for slot in slots]
        _APPLIED[owner] = self.name
        try:
            torch._foreach_copy_(slots, self._average)
            yield
        finally:
            self._release()
            torch._foreach_copy_(slots, originals)
            del _APPLIED[owner]

    def _release(self) -> None:
        if self._sharded:
            release_gathered(self._owner)

    def own_parts(self) -> list[tuple[str, Tensor]]:
        """This rank's share of the averages by parameter name, as `own_share` divides them."""
        parts = dict(zip(self._parameters, self._average, strict=True))
        return own_share(self._parameters, parts, is_sharded=self._sharded)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole float32 averages by the module's own parameter names, on the CPU of rank 0; collective.

        Independent of ZeRO stage and number of ranks. Other ranks get an empty dict under ZeRO-3.
        """
        state: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self._parameters.items(), self._average, strict=True):
            whole = gather_shards(parameter, average) if self._sharded else average.detach().cpu().clone()
            if whole is not None:
                state[name] = whole
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of whole averages; every rank calls it with the same mapping, nothing is exchanged.

        Args:
            state: as `state_dict` returned it on rank 0; may be lazy, each tensor is asked for once.
        Raises:
            ValueError: a name is missing or unknown, or a shape differs. Nothing was changed then.
        """
        missing, unknown = self._parameters.keys() - state.keys(), state.keys() - self._parameters.keys()
        if missing or unknown:
            raise ValueError(
                f"average {self.name!r} does not fit this model: "
                f"missing {sorted(missing)[:3]} of {len(missing)}, unknown {sorted(unknown)[:3]} of {len(unknown)}"
            )
        loaded: list[Tensor] = []
        for (name, parameter), average in zip(self._parameters.items(), self._average, strict=True):
            whole = state[name]
            shape = tuple(parameter.ds_shape if self._sharded else parameter.shape)
            if tuple(whole.shape) != shape:
                raise ValueError(f"average {self.name!r}: {name} must be {list(shape)}, got {list(whole.shape)}")
            if not self._sharded:
                loaded.append(whole.to(average))
                continue
            part = whole.reshape(-1)[shard_slice(parameter)]
            mine = torch.zeros_like(average)
            mine[: part.numel()] = part.to(average)
            loaded.append(mine)
        torch._foreach_copy_(self._average, loaded)
        self._write_twins()


def _check_decay(decay: float, name: str) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay of average {name!r} must be in [0, 1], got {decay}")
