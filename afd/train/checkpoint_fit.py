"""Whether a commit fits a run: the same models, stages, schedulers and ranks, told from its manifest alone."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from afd.distributed import world_size
from afd.models.lora import is_old_adapter
from afd.models.weights.sources import STUDENT_WEIGHTS
from afd.train.averaging import ParameterAverage
from afd.train.engines import Engine, bare_module, zero_stage

FORMAT = 1


def check_fits(
    commit: Path,
    manifest: dict[str, Any],
    engines: Mapping[str, Engine],
    averages: Mapping[str, ParameterAverage],
    *,
    unread: Collection[str],
) -> None:
    """Compare a manifest with this run; every rank comes to the same verdict without talking.

    Raises:
        ValueError: the first thing that differs.
    """
    if manifest["format"] != FORMAT:
        raise ValueError(f"{commit} has checkpoint format {manifest['format']}, this version reads {FORMAT}")
    saved_models = manifest["models"]
    if not engines.keys() <= saved_models.keys() <= engines.keys() | set(unread) or manifest["averages"] != sorted(
        averages
    ):
        raise ValueError(
            f"{commit} holds engines {sorted(saved_models)} and averages {manifest['averages']}, "
            f"this run has {sorted(engines)} and {sorted(averages)}"
        )
    for name, engine in engines.items():
        saved, own = saved_models[name], model_record(engine)
        for key in ("fingerprint", "num_parameters", "num_tensors"):
            if saved[key] != own[key]:
                raise ValueError(
                    f"{commit} is a checkpoint of another {name}: {saved['num_tensors']} tensors, "
                    f"{saved['num_parameters']} parameters, fingerprint {saved['fingerprint'][:12]}; this run's has "
                    f"{own['num_tensors']}, {own['num_parameters']}, {own['fingerprint'][:12]}"
                )
        for key in ("zero_stage", "dtype"):
            if saved[key] != own[key]:
                raise ValueError(f"{commit}: {name} was saved with {key} {saved[key]}, this run has {own[key]}")
        scheduler = own["scheduler"]
        if scheduler is not None and saved.get("scheduler", scheduler) != scheduler:  # absent in old commits
            raise ValueError(
                f"{commit}: {name} was trained with 'scheduler' {saved['scheduler'] or 'none'} in its DeepSpeed JSON, "
                f"this run's has {scheduler}, which would have no state to go on from: use the same, or none"
            )
        if engine.global_steps:
            raise ValueError(f"{name} engine has already taken {engine.global_steps} steps: resume in a new process")
    if manifest["world_size"] != world_size():
        raise ValueError(
            f"{commit} was written by {manifest['world_size']} ranks, this run has {world_size()}: start with "
            f"{manifest['world_size']} ranks, or begin a new run from its {STUDENT_WEIGHTS} (weights only)"
        )


def model_record(engine: Engine) -> dict[str, Any]:
    """What must agree for a checkpoint to fit: names, shapes and trainability in order; stage, dtype, and the
    scheduler of DeepSpeed's JSON."""
    digest = hashlib.sha256()
    total, count, dtype = 0, 0, ""
    parameters: dict[str, Any] = dict(bare_module(engine).named_parameters())
    for name, parameter in parameters.items():
        if is_old_adapter(name):
            continue  # whether v_old has an adapter of its own is a matter of speed, not of what is trained
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        digest.update(f"{name} {shape} {parameter.requires_grad}\n".encode())
        total += getattr(parameter, "ds_numel", parameter.numel())
        count += 1
        dtype = dtype or str(parameter.dtype)
    return {
        "fingerprint": digest.hexdigest(),
        "num_parameters": total,
        "num_tensors": count,
        "zero_stage": zero_stage(engine),
        "dtype": dtype,
        "scheduler": engine.lr_scheduler and type(engine.lr_scheduler).__name__,
    }
