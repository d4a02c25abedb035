"""DeepSpeed, and nothing else: reading its JSON, building one engine per role, and looking inside ZeRO's shards.

Only this module and `afd/train/checkpoint.py` know that DeepSpeed exists. What the trainer does with an engine
(`engine(...)`, `engine.backward`, `engine.step`) stays in the trainer.
"""

import copy
import difflib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

DSConfig = dict[str, Any]


class Engine(Protocol):
    """The part of a DeepSpeed engine that this project uses."""

    module: Any
    optimizer: Any
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


KNOWN_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_parallel_size",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
SHM_COMM_OP = "deepspeed_shm_comm"


def load_ds_config(path: str | Path) -> DSConfig:
    """Read and check one engine's DeepSpeed JSON before anything is built.

    Every knob must be decided: no "auto", an explicit `gradient_clipping`, `train_batch_size` together with the
    micro batch or the accumulation, and for bf16 an explicit `check_grad_overflow` (a skipped step is silent).

    Raises:
        ValueError: one line with the file, what is wrong and what would be right.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"DeepSpeed config {file} does not exist")
    try:
        config = json.loads(file.read_text(), object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise ValueError(f"DeepSpeed config {file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed config {file} must hold a JSON object, got {type(config).__name__}")
    try:
        check_ds_config(config)
    except ValueError as error:
        raise ValueError(f"DeepSpeed config {file}: {error}") from None
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return result


def check_ds_config(config: DSConfig) -> None:
    """Check one engine's configuration; see `load_ds_config`.

    Raises:
        ValueError: the first problem, in one line.
    """
    for key in config:
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown key {key!r}{hint}")
    undecided = _find_auto(config, "")
    if undecided:
        raise ValueError(f"{undecided} is 'auto': write the number, nothing here fills it in")
    if "train_batch_size" not in config:
        raise ValueError("'train_batch_size' is missing")
    if not {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & config.keys():
        raise ValueError("one of 'train_micro_batch_size_per_gpu' and 'gradient_accumulation_steps' is needed")
    if "gradient_clipping" not in config:
        raise ValueError("'gradient_clipping' is missing (DeepSpeed's own default changed between versions)")
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict) or "type" not in optimizer or "lr" not in optimizer.get("params", {}):
        raise ValueError('\'optimizer\' must be {"type": ..., "params": {"lr": ..., ...}}')
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"'zero_optimization' must be an object such as {{\"stage\": 3}}, got {zero!r}")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"'zero_optimization.stage' must be 0, 1, 2 or 3, got {stage!r}")
    for part in ("offload_param", "offload_optimizer"):
        if zero.get(part, {}).get("device") == "nvme":
            raise ValueError(f"'zero_optimization.{part}.device' nvme is not supported: averages need shards in memory")
    bf16 = config.get("bf16", {})
    if bf16.get("enabled") and "check_grad_overflow" not in bf16:
        raise ValueError("'bf16.check_grad_overflow' must be set: true skips a step with inf or nan, false takes it")


def _find_auto(value: Any, where: str) -> str | None:
    """The dotted name of the first "auto" in a nested configuration, or None."""
    if value == "auto":
        return repr(where)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found = _find_auto(child, f"{where}.{key}" if where else str(key))
        if found:
            return found
    return None


def batch_arithmetic(ds_config: DSConfig, world_size: int) -> tuple[int, int, int]:
    """Solve global = micro * accumulation * world_size for the number the JSON leaves out.

    Returns:
        (global batch, micro batch per rank, accumulation steps).
    Raises:
        ValueError: the numbers do not divide, or all three are given and disagree.
    """
    total = ds_config["train_batch_size"]
    micro = ds_config.get("train_micro_batch_size_per_gpu")
    accumulation = ds_config.get("gradient_accumulation_steps")
    given = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "ranks": world_size,
    }
    for name, number in given.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    known = (micro or 1) * (accumulation or 1) * world_size
    exact = micro is not None and accumulation is not None
    if total % known != 0 or (exact and total != known):
        factors = " * ".join(f"{name} {number}" for name, number in list(given.items())[1:] if number is not None)
        verb = "must equal" if exact else "must be a multiple of"
        raise ValueError(f"train_batch_size {total} {verb} {factors} = {known}")
    return total, micro or total // known, accumulation or total // known


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
    return deepspeed


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


def release_gathered(engine: Engine) -> None:
    """Drop whole parameters that a ZeRO-3 forward left behind, so that the next one reads the shards again.

    Raises:
        ValueError: called inside `gathered(engine)`, whose parameters are in use.
    """
    from deepspeed.runtime.zero.partition_parameters import DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR as DEPTH

    if any(getattr(parameter, DEPTH, 0) for parameter in engine.module.parameters()):
        raise ValueError("the parameters are gathered: enter `applied()` first and `gathered(engine)` inside it")
    engine.optimizer.empty_partition_cache()


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


def consolidated_weights(engine: Engine) -> dict[str, Tensor]:
    """All weights of an engine under the module's own names, one gather at a time; collective.

    Trainable parameters come from the optimizer's float32 masters under ZeRO-3, others in the dtype they are held.

    Returns:
        Name to CPU tensor on rank 0; an empty dict elsewhere.
    """
    module = bare_module(engine)
    sharded = zero_stage(engine) == 3
    weights: dict[str, Tensor] = {}
    parameters: dict[str, Any] = dict(module.named_parameters())
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
