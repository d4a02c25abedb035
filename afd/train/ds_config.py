"""Reading and checking one engine's DeepSpeed JSON, and its batch arithmetic; imports no DeepSpeed.

DeepSpeed picks its accelerator when it is imported, which takes seconds: its own fields are read from its source.
"""

import ast
import difflib
import functools
import json
import math
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from afd.config import RunConfig
from afd.planning.refusals import batch_arithmetic

__all__ = ["KNOWN_KEYS", "DSConfig", "batch_arithmetic", "check_ds_config", "load_critic_config", "load_ds_config"]

DSConfig = dict[str, Any]

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

_SECTIONS = (
    "activation_checkpointing",
    "bf16",
    "bfloat16",
    "data_types",
    "fp16",
    "scheduler",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
)
_MODELS = {
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
}
"""DeepSpeed's model of a section: the file in its package, and the class."""
_OPTIMIZERS = ("Adagrad", "Adam", "AdamW", "Lamb", "Lion", "Muon")
"""Those that DeepSpeed builds itself, in any case of letters, without a further package."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = ("a finite number > 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE: _Rule = ("a finite number >= 0", lambda value: _is_number(value) and value >= 0)
_COUNT: _Rule = ("an integer >= 1", lambda value: _is_number(value) and isinstance(value, int) and value >= 1)
_BOOLEAN: _Rule = ("true or false", lambda value: isinstance(value, bool))
_STAGE: _Rule = ("0, 1, 2 or 3", lambda value: not isinstance(value, bool) and value in (0, 1, 2, 3))
_DEVICE: _Rule = (
    "'none' or 'cpu' (nvme is not supported: averages need shards in memory)",
    lambda value: value in ("none", "cpu"),
)
_RULES = {
    "bf16.enabled": _BOOLEAN,
    "fp16.enabled": _BOOLEAN,
    "gradient_clipping": _NOT_NEGATIVE,
    "optimizer.params.lr": _NOT_NEGATIVE,
    "sequence_parallel_size": _COUNT,
    "zero_optimization.offload_optimizer.device": _DEVICE,
    "zero_optimization.offload_param.device": _DEVICE,
    "zero_optimization.reduce_bucket_size": _POSITIVE,
    "zero_optimization.stage": _STAGE,
    "zero_optimization.stage3_prefetch_bucket_size": _NOT_NEGATIVE,
    "zero_optimization.sub_group_size": _POSITIVE,
    "zero_optimization.zero_hpz_partition_size": _COUNT,
}
"""What we compute with, by its dotted name: what it must be, and whether a value is."""


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


def load_critic_config(config: RunConfig) -> tuple[DSConfig, ...]:
    """The JSON of the critic's engine, for objective dmd; else nothing.

    Raises:
        ValueError: see `load_ds_config`.
    """
    return (load_ds_config(config.dmd.ds_config),) if config.objective == "dmd" else ()


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
    _refuse_unknown(config, KNOWN_KEYS, prefix="")
    if "torch_autocast" in config:
        raise ValueError("'torch_autocast' is not supported: rollouts run the bare module, outside of it, use 'bf16'")
    undecided = _find_auto(config, "")
    if undecided:
        raise ValueError(f"{undecided} is 'auto': write the number, nothing here fills it in")
    if "train_batch_size" not in config:
        raise ValueError("'train_batch_size' is missing")
    if not {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & config.keys():
        raise ValueError("one of 'train_micro_batch_size_per_gpu' and 'gradient_accumulation_steps' is needed")
    if "gradient_clipping" not in config:
        raise ValueError("'gradient_clipping' is missing (DeepSpeed's own default changed between versions)")
    for where in _SECTIONS:
        for value in _given(config, where):
            if not isinstance(value, dict):
                raise ValueError(f"{where!r} must be an object, got {value!r}")
    for where, (file, model) in _MODELS.items():
        for section in _given(config, where):
            _refuse_unknown(section, deepspeed_fields(file, model), prefix=f"{where}.")
    _check_optimizer(config.get("optimizer"))
    for where, (expected, is_right) in _RULES.items():
        for value in _given(config, where):
            if not is_right(value):
                raise ValueError(f"{where!r} must be {expected}, got {value!r}")
    if "scheduler" in config and "type" not in config["scheduler"]:
        raise ValueError(f'\'scheduler\' must be {{"type": ..., "params": {{...}}}}, got {config["scheduler"]!r}')
    bf16 = config.get("bf16", {})
    if bf16.get("enabled") and "check_grad_overflow" not in bf16:
        raise ValueError("'bf16.check_grad_overflow' must be set: true skips a step with inf or nan, false takes it")


def _given(config: DSConfig, where: str) -> list[Any]:
    """The value under a dotted name, in a list; an empty one where the name is not written."""
    value: Any = config
    for part in where.split("."):
        if not isinstance(value, dict) or part not in value:
            return []
        value = value[part]
    return [value]


def engine_dtype(config: DSConfig) -> torch.dtype:
    """What an engine computes in."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def _refuse_unknown(section: DSConfig, known: Collection[str], *, prefix: str) -> None:
    for key in section:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {prefix + close[0]!r}?" if close else ""
            raise ValueError(f"unknown key {prefix + key!r}{hint}")


@functools.cache
def deepspeed_fields(file: str, model: str) -> frozenset[str]:
    """Names and aliases of the fields of one of DeepSpeed's pydantic models, as the installed version defines it.

    Args:
        file: relative to DeepSpeed's package.
        model: name of the class.
    """
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    names: list[str] = []
    for node in ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8")).body:
        for field in node.body if isinstance(node, ast.ClassDef) and node.name == model else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                options = field.value.keywords if isinstance(field.value, ast.Call) else ()
                names += [field.target.id, *(ast.literal_eval(each.value) for each in options if each.arg == "alias")]
    return frozenset(names)


def _check_optimizer(optimizer: Any) -> None:
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(params, dict) or "type" not in optimizer or "lr" not in params:
        raise ValueError('\'optimizer\' must be {"type": ..., "params": {"lr": ..., ...}}')
    kind, known = optimizer["type"], [name for name in dir(torch.optim) if _is_optimizer(name)]
    if isinstance(kind, str) and (kind in known or kind.lower() in map(str.lower, _OPTIMIZERS)):
        return
    close = difflib.get_close_matches(str(kind), {*known, *_OPTIMIZERS}, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"'optimizer.type' must be one of {', '.join(_OPTIMIZERS)} or a class of torch.optim, got {kind!r}{hint}"
    )


def _is_optimizer(name: str) -> bool:
    found = getattr(torch.optim, name)
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer


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
