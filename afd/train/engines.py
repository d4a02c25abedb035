"""DeepSpeed, and nothing else: building one engine per role, and looking inside ZeRO's shards.

Only this module and `afd/train/checkpoint.py` know that DeepSpeed exists. What the trainer does with an engine
(`engine(...)`, `engine.backward`, `engine.step`) stays in the trainer.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from afd.distributed import world_rank, world_size
from afd.train.ds_config import DSConfig, batch_arithmetic, check_ds_config


class Engine(Protocol):
    """The part of a DeepSpeed engine that this project uses."""

    module: Any
    optimizer: Any
    lr_scheduler: Any
    global_steps: int
    skipped_steps: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor, /) -> Any: ...
    def step(self) -> None: ...
    def get_lr(self) -> list[float]: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def optimizer_params(self) -> dict[str, Any]: ...
    def train(self, mode: bool = True, /) -> Any: ...
    def eval(self) -> Any: ...
    def get_global_grad_norm(self) -> Any: ...
    def zero_optimization_stage(self) -> int: ...
    def save_checkpoint(
        self, save_dir: str, tag: str, *, save_latest: bool, exclude_frozen_parameters: bool
    ) -> Any: ...
    def load_checkpoint(self, load_dir: str, tag: str, *, load_module_strict: bool) -> Any: ...


ModuleT = TypeVar("ModuleT", bound=nn.Module)
SHM_COMM_OP = "deepspeed_shm_comm"


def build_engine(
    module: nn.Module,
    ds_config: DSConfig,
    *,
    lr: float | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
) -> Engine:
    """Wrap a module in a DeepSpeed engine; only parameters that require a gradient reach the optimizer.

    Weights become rank 0's. With `"torch_adam": true` nothing is compiled at run time on a CPU; the shared-memory
    collectives, which would be, are switched off there.

    Args:
        module: any module on this process's device or on the CPU; converted in place (dtype, ZeRO-3 shards).
        ds_config: as `load_ds_config` returns it; not modified.
        lr: replaces the JSON's learning rate.
        leaf_modules: classes that ZeRO-3 gathers as a whole, with one collective for all their parameters.
    Raises:
        ValueError: the configuration is wrong for this world, the module trains nothing, or no process group.
    """
    check_ds_config(ds_config)
    if not dist.is_initialized():
        raise ValueError("build_engine needs the process group: call afd.distributed.init_world first")
    batch_arithmetic(ds_config, dist.get_world_size())
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("build_engine needs a module with at least one parameter that requires a gradient")
    config = copy.deepcopy(ds_config)
    if lr is not None:
        config["optimizer"]["params"]["lr"] = lr
    deepspeed = _import_deepspeed()
    if leaf_modules and config.get("zero_optimization", {}).get("stage") == 3:
        deepspeed.utils.set_z3_leaf_modules(module, list(leaf_modules))
    return deepspeed.initialize(model=module, model_parameters=trainable, config=config)[0]


class _SkipRandomInit(TorchFunctionMode):
    """Leave new parameters as they are: they are about to be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_sharded(make: Callable[[], ModuleT], ds_config: DSConfig) -> ModuleT:
    """Build a module whose parameters are ZeRO-3 shards from the start; collective.

    Each parameter is allocated, sharded and freed before the next one, under `deepspeed.zero.Init`. Their values are
    undefined: fill them with `write_shard`.

    Args:
        make: builds the module.
        ds_config: of the engine that the module is for, stage 3.
    Raises:
        ValueError: the configuration keeps quantised copies of the shards.
    """
    zero = ds_config["zero_optimization"]
    if zero.get("zero_quantized_weights"):
        raise ValueError("zero_optimization.zero_quantized_weights must be left out: shards are written once, got true")
    offload = zero.get("offload_param", {})
    deepspeed = _import_deepspeed()
    init = deepspeed.zero.Init(
        config_dict_or_path=copy.deepcopy(ds_config),
        remote_device=offload.get("device"),
        pin_memory=offload.get("pin_memory", False),
    )
    with init, _SkipRandomInit():
        return make()


def write_shard(parameter: Any, tensor: Tensor) -> None:
    """Write this rank's part of a whole tensor [...] into its shard of a ZeRO-3 parameter of that shape."""
    own = shard_slice(parameter)
    shard = parameter.ds_tensor.data
    shard[: own.stop - own.start].copy_(tensor.reshape(-1)[own])
    parameter.ds_secondary_tensor = None  # hpZ's copy of what was there before


def _import_deepspeed() -> Any:
    """Import DeepSpeed for the device the process group serves, quietly, without run-time compilation on a CPU."""
    on_cpu = dist.get_backend() == "gloo"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # torch 2.13 renamed two collectives and warns on each ZeRO-3 step about DeepSpeed's use of the old names.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    if on_cpu:
        deepspeed.ops.__compatible_ops__[SHM_COMM_OP] = False
        _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Every engine imports Muon, whose functions are compiled by a decorator that loads inductor: two seconds."""
    from deepspeed.runtime import compiler

    compile_later, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_later


def is_engine(candidate: Engine | nn.Module) -> bool:
    """True for what `build_engine` returns, without importing DeepSpeed."""
    return hasattr(candidate, "zero_optimization_stage")


def zero_stage(owner: Engine | nn.Module) -> int:
    """The ZeRO stage of an engine; 0 for a plain module."""
    stage: Any = getattr(owner, "zero_optimization_stage", None)
    return int(stage()) if stage is not None else 0


def bare_module(owner: Engine | nn.Module) -> nn.Module:
    """The module inside an engine, or the module itself: its parameters carry the model's own names."""
    module: Any = owner.module if is_engine(owner) else owner
    return module


def has_frozen(engine: Engine) -> bool:
    """Whether some of the model's parameters are not trained."""
    return any(not parameter.requires_grad for parameter in bare_module(engine).parameters())


@contextmanager
def gathered(engine: Engine) -> Iterator[Any]:
    """Gather all parameters once and run the bare module without ZeRO-3's hooks, for rollouts.

    Inside, forwards need no collective at all, so ranks may do different numbers of them. Entering is collective.
    Stages 0 to 2 hold whole parameters anyway: nothing happens. Run under `torch.no_grad()`, never `engine.step()`.
    """
    if zero_stage(engine) < 3:
        yield bare_module(engine)
        return
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    offload = engine.optimizer.parameter_offload
    unwrapped: Any = unwrap_model_for_generation(engine)
    unwrapped.__enter__()
    # unwrap_model_for_generation leaves this one in place: it compares traces over the ranks at each forward, and
    # records the hookless forward as an empty trace.
    offload.fwd_pre_hook.remove()
    try:
        yield engine.module
    finally:
        # Leaving through __exit__ with no exception restores the hooks even when the rollout raised.
        unwrapped.__exit__(None, None, None)
        offload.fwd_pre_hook = engine.module.register_forward_pre_hook(
            lambda module, *inputs: offload.get_param_coordinator().reset_step(), prepend=True
        )


def is_gathered_copy(parameter: Any) -> bool:
    """Whether a ZeRO-3 parameter's whole tensor is a copy that leaving `gathered` drops (alone: its shard)."""
    shards = (getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
    held = {shard.untyped_storage().data_ptr() for shard in shards if shard is not None}
    return bool(held) and parameter.data.untyped_storage().data_ptr() not in held


def release_gathered(engine: Engine) -> None:
    """Drop whole parameters that a ZeRO-3 forward left behind, so that the next one reads the shards again.

    Raises:
        ValueError: called inside `gathered(engine)`, whose parameters are in use.
    """
    from deepspeed.runtime.zero.partition_parameters import DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR as DEPTH

    if any(getattr(parameter, DEPTH, 0) for parameter in engine.module.parameters()):
        raise ValueError("the parameters are gathered: enter `applied()` first and `gathered(engine)` inside it")
    engine.optimizer.empty_partition_cache()
    # hpZ's copies hold what was gathered: DeepSpeed renews them after its own steps, not after a swap of shards.
    engine.optimizer.invalidate_secondary_tensor()


def local_shard(parameter: Any) -> Tensor:
    """This rank's float32 master shard of a trainable ZeRO-3 parameter: [padded numel / ranks], shares memory."""
    from deepspeed.utils import safe_get_local_fp32_param

    shard: Any = safe_get_local_fp32_param(parameter)
    return shard.detach()


def shard_slice(parameter: Any) -> slice:
    """The part of the flattened ZeRO-3 parameter that this rank holds; the shard's tail beyond it is padding."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * dist.get_rank(), parameter.ds_numel)
    return slice(start, min(start + size, parameter.ds_numel))


def own_share(
    parameters: Mapping[str, Any], parts: Mapping[str, Tensor], *, is_sharded: bool
) -> list[tuple[str, Tensor]]:
    """This rank's share of tensors by parameter name: of each its part without the padding under ZeRO-3, else every
    so many-th, whole.

    Args:
        parameters: tell where a shard's padding begins.
        parts: what is shared out: flat shards under ZeRO-3, else whole tensors.
        is_sharded: whether the engine is a ZeRO-3 one.
    """
    if not is_sharded:
        return list(parts.items())[world_rank() :: world_size()]
    slices = {name: shard_slice(parameters[name]) for name in parts}
    return [(name, part[: slices[name].stop - slices[name].start]) for name, part in parts.items()]


def gather_shards(parameter: Any, shard: Tensor) -> Tensor | None:
    """Put a ZeRO-3 parameter together on rank 0 from one shard per rank; collective.

    Args:
        parameter: tells shape and padding.
        shard: [padded numel / ranks] on this rank's device, any dtype.
    Returns:
        The parameter's shape, on the CPU, on rank 0; None elsewhere.
    """
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    if dist.get_world_size() > 1:
        dist.gather(shard.contiguous(), shards, dst=0)
    else:
        shards = [shard]
    if shards is None:
        return None
    return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape).cpu().clone()


def consolidated_weights(engine: Engine, *, skip: Callable[[str], bool] = lambda name: False) -> dict[str, Tensor]:
    """All weights of an engine under the module's own names, one gather at a time; collective.

    Trainable parameters come from the optimizer's float32 masters under ZeRO-3, others in the dtype they are held.

    Args:
        engine: of any stage.
        skip: names to leave out; the same on every rank.
    Returns:
        Name to CPU tensor on rank 0; an empty dict elsewhere.
    """
    module = bare_module(engine)
    sharded = zero_stage(engine) == 3
    weights: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {name: each for name, each in module.named_parameters() if not skip(name)}
    for name, parameter in parameters.items():
        if sharded:
            shard = local_shard(parameter) if parameter.requires_grad else parameter.ds_tensor.data
            whole = gather_shards(parameter, shard)
        else:
            whole = parameter.detach().cpu().clone()
        if whole is not None:
            weights[name] = whole
    if dist.get_rank() != 0:
        return {}
    kept = module.state_dict().keys()
    weights.update({name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in kept})
    return weights
