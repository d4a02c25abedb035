"""Reading and checking one engine's DeepSpeed JSON, and its batch arithmetic; imports no DeepSpeed."""

import difflib
import json
from pathlib import Path
from typing import Any

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
