"""A trained student out of a commit, ready to sample: needs neither DeepSpeed nor pickle nor a process group."""

from __future__ import annotations

from pathlib import Path

from afd.config import RunConfig
from afd.config_file import load_config
from afd.models.student import CausalStudent
from afd.models.weights import check_names_and_shapes, read_student_shape
from afd.train.builders import prepare_student
from afd.train.checkpoint import CONFIG, STUDENT_WEIGHTS, read_student_weights
from afd.train.commit import list_commits


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


def load_commit(path: Path, *, average: str | None = "ema") -> tuple[CausalStudent, RunConfig]:
    """The student of a commit with an average's weights (None: the raw ones), and the run's configuration.

    Raises:
        ValueError: the commit is damaged, or lacks that average.
    """
    config = load_config(path / CONFIG)
    weights = read_student_weights(path, average=average)
    student = prepare_student(CausalStudent(read_student_shape(path / STUDENT_WEIGHTS)), config)
    check_names_and_shapes(student.state_dict(), weights, source=f"commit {path}")
    student.load_state_dict(weights)
    return student.eval().requires_grad_(False), config
