"""Saving and resuming a run: its engines, the averages, every rank's random state and progress, in one commit.

DeepSpeed writes and reads its engines' files; commit.py makes the whole durable and checks it before anything is
unpickled. `student.safetensors` and `averages/*.safetensors` hold whole float32 weights under the model's own names:
sampling and export read those and need neither DeepSpeed nor pickle.
"""

import importlib.metadata
import logging
import platform
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd.distributed import barrier, broadcast_object, gather_objects, world_rank, world_size
from afd.models.lora import is_old_adapter
from afd.models.weights.sources import CONFIG, STUDENT_WEIGHTS
from afd.train.averaging import ParameterAverage
from afd.train.checkpoint_fit import FORMAT, check_fits, model_record
from afd.train.commit import (
    commit_bytes,
    commit_name,
    commit_problems,
    file_sha256,
    list_commits,
    list_files,
    persist_files,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
    write_durably,
    write_manifest,
)
from afd.train.engines import Engine, bare_module, consolidated_weights, has_frozen
from afd.train.frozen_weights import frozen_digests, frozen_problem
from afd.train.rank_state import check_plain, random_state, restore_random_state

logger = logging.getLogger(__name__)

TAG = "engine"
STUDENT = "student"
RESERVE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Restored:
    """What a commit gives back beside the engines, averages and random states it restored in place."""

    step: int
    state: dict[str, Any]
    config: str
    path: Path


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    engines: Mapping[str, Engine],
    averages: Mapping[str, ParameterAverage],
    state: dict[str, Any],
    config: str,
    weights_metadata: Mapping[str, str] | None = None,
    fixed: Mapping[str, ParameterAverage] | None = None,
    keep: int = 2,
    replaces: bool = False,
) -> Path:
    """Write one commit and publish it atomically; collective, between two steps.

    Args:
        output_dir: the run's folder, shared by all ranks and held by a `RunLock`.
        step: optimizer steps done.
        engines: by role; "student" is the one whose weights are also written as safetensors.
        averages: by name.
        state: this rank's own progress, such as {"loader": ..., "trainer": ...}: plain values and tensors only.
        config: the resolved configuration's text.
        weights_metadata: strings for the header of student.safetensors, such as the model's dimensions.
        fixed: averages that never move; like frozen parameters not written, only their digest is.
        keep: commits left after pruning, this one included; >= 1.
        replaces: an existing commit of this step is an earlier state of this run; delete it instead of keeping it.
    Returns:
        The commit's folder.
    Raises:
        ValueError: wrong arguments, or a `state` that needs pickle to be read back.
        OSError: not enough free space, or writing failed; on every rank.
    """
    if step < 0 or keep < 1 or STUDENT not in engines:
        raise ValueError(f"need step >= 0, keep >= 1 and a 'student' engine, got {step}, {keep}, {sorted(engines)}")
    check_plain(state, "state")
    output = Path(output_dir)
    final = output / commit_name(step)
    temporary = output / f"{final.name}.tmp-{broadcast_object(secrets.token_hex(4))}"
    _on_rank_0(lambda: _prepare(temporary, _estimated_bytes(engines, averages)))
    for name, engine in engines.items():
        is_partial = has_frozen(engine)
        engine.save_checkpoint(str(temporary / name), tag=TAG, save_latest=False, exclude_frozen_parameters=is_partial)
    _write_weights(temporary, engines[STUDENT], averages, dict(weights_metadata or {}))
    torch.save({"random": random_state(), "state": state}, temporary / "ranks" / f"rank_{world_rank():05d}.pt")
    barrier()
    _on_rank_0(lambda: write_durably(temporary / CONFIG, config))
    names = list_files(temporary)
    records = gather_objects(persist_files(temporary, names[world_rank() :: world_size()]))
    body = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size(),
        "models": {name: model_record(engine) for name, engine in engines.items()},
        "averages": sorted(averages),
        "frozen": frozen_digests(engines, fixed or {}),
        "versions": _versions(),
        "files": {name: record for part in records for name, record in part.items()},
    }
    _on_rank_0(lambda: _finish(temporary, final, body, keep=keep, replaces=replaces))
    return final


def _on_rank_0(action: Any) -> None:
    """Run on rank 0 while the others wait; a failure to write is raised on every rank instead of hanging them."""
    problem = None
    if world_rank() == 0:
        try:
            action()
        except (OSError, SafetensorError) as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise OSError(problem)


def _prepare(temporary: Path, needed: int) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(temporary.parent)
    free = shutil.disk_usage(temporary.parent).free
    if free < needed:
        raise OSError(
            f"checkpoint needs about {needed / 2**30:.2f} GiB in {temporary.parent}, "
            f"only {free / 2**30:.2f} GiB are free"
        )
    for folder in ("ranks", "averages"):
        (temporary / folder).mkdir(parents=True)


def _finish(temporary: Path, final: Path, body: dict[str, Any], *, keep: int, replaces: bool) -> None:
    if list_files(temporary) != sorted(body["files"]):
        raise OSError(f"the ranks do not see the same files in {temporary}: the output folder must be shared by all")
    write_manifest(temporary, body)
    publish(temporary, final, replaces=replaces)
    prune(final.parent, newest=body["step"], keep=keep)


def _estimated_bytes(engines: Mapping[str, Engine], averages: Mapping[str, ParameterAverage]) -> int:
    """Size of a commit from the parameter counts, and a reserve."""
    total = RESERVE_BYTES
    for role, engine in engines.items():
        parameters: dict[str, Any] = dict(bare_module(engine).named_parameters())
        for name, parameter in parameters.items():
            if is_old_adapter(name):
                continue  # in no file of its own: the old policy is an average
            count: int = getattr(parameter, "ds_numel", parameter.numel())
            total += commit_bytes(
                count if parameter.requires_grad else 0,
                0 if parameter.requires_grad else count,
                width=parameter.element_size(),
                averages=len(averages) if role == STUDENT else None,
            )
    return total


def _write_weights(
    folder: Path, student: Engine, averages: Mapping[str, ParameterAverage], metadata: dict[str, str]
) -> None:
    """Write whole float32 weights and averages from rank 0; every rank takes part in the gathers."""
    weights = consolidated_weights(student, skip=is_old_adapter)  # the old policy is an average of its own
    whole = {name: each.contiguous() for name, each in weights.items()}
    _on_rank_0(lambda: save_file(whole, folder / STUDENT_WEIGHTS, metadata=metadata))
    for name, average in averages.items():
        values = average.state_dict()
        _on_rank_0(lambda file=folder / "averages" / f"{name}.safetensors", values=values: save_file(values, file))


def find_commit(output_dir: str | Path) -> Path | None:
    """The newest commit that verifies, or None where there has never been one; collective, the ranks share the work.

    A damaged commit is named in a warning and the next older one is tried.

    Raises:
        ValueError: there are commits but none verifies: a run never restarts from step 0 by itself.
    """
    commits = broadcast_object(list_commits(Path(output_dir)))
    problems: list[str] = []
    for _, folder in commits:
        problems = verify_commit(folder)
        if not problems:
            return folder
        if world_rank() == 0:
            logger.warning("damaged commit, trying the one before it: %s", "; ".join(problems[:3]))
    if commits:
        raise ValueError(
            f"none of the {len(commits)} commits in {output_dir} verifies ({problems[0]}): "
            "restore one from a backup, or start afresh in another folder"
        )
    return None


def verify_commit(path: str | Path) -> list[str]:
    """All problems of a commit, empty when it is whole; collective, each rank hashes its share of the files."""
    shares = gather_objects(commit_problems(Path(path), rank=world_rank(), size=world_size()))
    return sorted({problem for share in shares for problem in share})


def load_checkpoint(
    path: str | Path,
    *,
    engines: Mapping[str, Engine],
    averages: Mapping[str, ParameterAverage],
    is_verified: bool = False,
    unread: Collection[str] = (),
    fixed: Mapping[str, ParameterAverage] | None = None,
) -> Restored:
    """Restore fresh engines, averages and this rank's random states from a commit; collective.

    The optimizer's learning rate, betas and weight decay are the JSON's of this run, not the commit's; a scheduler in
    there goes on where it was.

    Args:
        path: the commit.
        engines: by role, built with the same modules and JSON, not stepped yet.
        averages: by name, as saved.
        is_verified: skip hashing, for a path that `find_commit` just returned.
        unread: roles whose engines the commit may hold though this run has none; they stay on the disk.
        fixed: as given to `save_checkpoint`.
    Returns:
        The step, this rank's own `state`, and the configuration's text.
    Raises:
        ValueError: another model, frozen weights, stage, scheduler, number of ranks or set of roles; used engines; or a
            damaged commit. Raised before any engine is touched.
    """
    commit = Path(path)
    manifest = read_manifest(commit)
    check_fits(commit, manifest, engines, averages, unread=unread)
    other = frozen_problem(manifest.get("frozen", {}), frozen_digests(engines, fixed or {}))  # absent in old commits
    if other:
        raise ValueError(f"{commit} {other}")
    problems = [] if is_verified else verify_commit(commit)
    if problems:
        raise ValueError(f"damaged commit: {'; '.join(problems[:3])}")
    for name, engine in engines.items():
        _load_engine(engine, commit / name)
    for name, average in averages.items():
        with _LazyTensors(commit / "averages" / f"{name}.safetensors") as values:
            average.load_state_dict(values)
    own = torch.load(commit / "ranks" / f"rank_{world_rank():05d}.pt", weights_only=True)
    restore_random_state(own["random"])
    return Restored(manifest["step"], own["state"], (commit / CONFIG).read_text(), commit)


def _load_engine(engine: Engine, folder: Path) -> None:
    """Everything but the optimizer's settings, which stay the JSON's of this run; what a scheduler in there moves goes
    on where it was."""
    moved = ("lr", "betas", "momentum") if engine.lr_scheduler is not None else ()
    kept = [name for name in engine.optimizer_params() if name not in moved]
    own = [{name: group[name] for name in kept if name in group} for group in engine.optimizer.param_groups]
    found, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not has_frozen(engine))
    if found is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {folder}, though it verified")
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(settings)


def _versions() -> dict[str, str]:
    installed = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "safetensors", "numpy")}
    return {"python": platform.python_version(), **installed}


class _LazyTensors(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._file = safe_open(self._path, framework="pt").__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def read_student_weights(path: str | Path, *, average: str | None = None) -> dict[str, Tensor]:
    """Whole student weights of a commit by the model's own names, on the CPU; no DeepSpeed, no pickle.

    Args:
        path: the commit.
        average: lay this average over the raw weights (with LoRA it covers the adapter only).
    Raises:
        ValueError: no such average, or a file is missing or damaged.
    """
    commit = Path(path)
    manifest = read_manifest(commit)
    if average is not None and average not in manifest["averages"]:
        raise ValueError(f"{commit} has no average {average!r}, only {manifest['averages']}")
    names = [STUDENT_WEIGHTS] + ([f"averages/{average}.safetensors"] if average is not None else [])
    weights: dict[str, Tensor] = {}
    for name in names:
        file = commit / name
        if not file.is_file() or file_sha256(file) != manifest["files"][name]["sha256"]:
            raise ValueError(f"{file} is missing or damaged")
        weights.update(load_file(file))
    return weights
