"""A trained student out of a commit, ready to sample: needs neither DeepSpeed nor pickle nor a process group."""

from __future__ import annotations

from pathlib import Path

from afd.config import RunConfig
from afd.config_file import ConfigError, load_config
from afd.models.student import CausalStudent
from afd.models.weights import check_names_and_shapes, stored_shape
from afd.models.weights.sources import CONFIG, STUDENT_WEIGHTS
from afd.train.builders import prepare_student
from afd.train.checkpoint import read_student_weights
from afd.train.commit import list_commits, read_manifest
from afd.train.preflight import RunPlan


def resolve_commit(path: Path) -> Path:
    """The commit meant by a path: a commit, a checkpoints folder, or a run's output folder (its newest commit).

    Raises:
        ValueError: there is no commit.
    """
    if (path / STUDENT_WEIGHTS).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        commits = list_commits(folder)
        if commits:
            return commits[0][1]
    raise ValueError(f"--checkpoint {path} must be a commit, a checkpoints folder or a run's folder, got none of them")


def check_resumable(config: RunConfig, plan: RunPlan) -> None:
    """Refuse to go on from another run's commit while nothing of that run has been touched; reads headers only.

    A damaged newest commit passes: choosing an older one is `find_commit`'s.

    Raises:
        ConfigError: the output folder's newest commit is of another student, data set or number of ranks, or of an
            objective with other engines (a discriminator that this run never asks is left unread).
    """
    commits = list_commits(config.output_dir / "checkpoints")
    if not commits:
        return
    commit = commits[0][1]
    try:
        manifest = read_manifest(commit)
        world_size, roles = manifest["world_size"], manifest["models"].keys()
        saved = stored_shape(commit / STUDENT_WEIGHTS).model_dump()
        before = load_config(commit / CONFIG)
    except ValueError:
        return
    own = plan.shape.model_dump()
    different = [f"{name} {saved[name]}, not {own[name]}" for name in own if saved[name] != own[name]]
    pairs = {
        "LoRA": (before.student.lora, config.student.lora),
        "teacher": (before.teacher, config.teacher),
        "video format": (before.video, config.video),
        "encoder": (before.encoders, config.encoders),
    }
    if config.has_discriminator:
        pairs |= {
            "discriminator": (_discriminator_kind(before), _discriminator_kind(config)),
            "VLM": (before.discriminator.vlm, config.discriminator.vlm),
        }
    if not _needed_roles(config) <= roles <= _needed_roles(config) | {"discriminator"}:
        different.append(f"objective {before.objective}, not {config.objective}")
    different += [f"another {name}" for name, (old, new) in pairs.items() if old != new]
    if world_size != plan.world_size:
        different.append(f"{world_size} ranks, not {plan.world_size}")
    if different:
        raise ConfigError(
            f"output_dir {config.output_dir} holds a run with {'; '.join(different[:3])}: choose another output_dir, "
            "or set that run aside with --fresh"
        )


def _needed_roles(config: RunConfig) -> set[str]:
    """Whose engines the objective has."""
    return (
        {"student"}
        | ({"discriminator"} if config.has_discriminator else set())
        | ({"critic"} if config.objective == "dmd" else set())
    )


def _discriminator_kind(config: RunConfig) -> tuple[object, ...]:
    """What a commit's discriminator needs that the commit does not hold: frozen backbones come from the student."""
    section = config.discriminator
    return (section.kind, section.backbone, config.student.init_from) if section.kind == "backbone" else (section.kind,)


def load_commit(path: Path, *, average: str | None = "ema") -> tuple[CausalStudent, RunConfig]:
    """The student of a commit with an average's weights (None: the raw ones), and the run's configuration.

    Raises:
        ValueError: the commit is damaged, or lacks that average.
    """
    config = load_config(path / CONFIG)
    weights = read_student_weights(path, average=average)
    student = prepare_student(CausalStudent(stored_shape(path / STUDENT_WEIGHTS)), config)
    check_names_and_shapes(student.state_dict(), weights, source=f"commit {path}")
    student.load_state_dict(weights)
    return student.eval().requires_grad_(False), config
