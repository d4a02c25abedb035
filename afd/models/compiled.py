"""The rollout's step through one block, as it is or compiled: its shapes repeat over layers, steps and chunks.

Compiled are the projections, norms and feed-forward. Writing to the KV cache and attention stay outside: whether a
compiler updates a buffer of gigabytes in place is its choice. That compiling changes nothing is tested with a backend
that runs on any machine; whether it helps on a GPU is unmeasured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from afd.models.kv_cache import LayerCache

CompileMode = Literal["none", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "aot_eager"]
BlockStep = Callable[[nn.Module, Tensor, Tensor, Any, Any, LayerCache, str | None], Tensor]


@functools.cache
def block_step(mode: CompileMode) -> BlockStep:
    """`step(block, x, modulation, prompt, rope, cache, attention_impl)` -> [N, tokens, dim].

    Args:
        mode: "none"; a mode of `torch.compile` ("reduce-overhead" records CUDA graphs); or "aot_eager", which traces
            like the others and runs the traced operations one by one, for tests.
    """
    if mode == "none":
        return _step
    options: dict[str, Any] = {"backend": mode} if mode == "aot_eager" else {"mode": mode}
    compiled = torch.compile(_step_past_hooks, **options)

    class UntracedLayerCache(LayerCache):
        attend: Any = torch.compiler.disable(LayerCache.attend)  # pyright: ignore[reportIncompatibleMethodOverride]

    def step(
        block: nn.Module, x: Tensor, modulation: Tensor, prompt: Any, rope: Any, cache: LayerCache, impl: str | None
    ) -> Tensor:
        return compiled(block, x, modulation, prompt, rope, UntracedLayerCache(cache.cache, cache.layer), impl)

    return step


def _step(
    block: nn.Module, x: Tensor, modulation: Tensor, prompt: Any, rope: Any, cache: LayerCache, impl: str | None
) -> Tensor:
    return block(x, modulation, prompt, rope, None, cache, impl)


def _step_past_hooks(
    block: nn.Module, x: Tensor, modulation: Tensor, prompt: Any, rope: Any, cache: LayerCache, impl: str | None
) -> Tensor:
    """A compiled block has no module hooks; inside `gathered` ZeRO-3 has removed its own."""
    return block.forward(x, modulation, prompt, rope, None, cache, impl)
