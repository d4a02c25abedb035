"""Slurm: a job's description to a batch script, and a task's SLURM_* variables to a rank's.

The templates are `launch/slurm/*.sh.j2`; every value reaches them quoted, for the shell or for `#SBATCH`, and a value
that cannot be quoted is refused. How a run stops and goes on is afd/stopping.py's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import jinja2
from pydantic import Field, model_validator

import afd
from afd.config.section import NonNegative, Positive, Section

TEMPLATES = Path(afd.__file__).parents[1] / "launch" / "slurm"
KINDS = ("single", "srun", "torchrun", "deepspeed", "sweep", "prepare", "evaluate")
SIGNAL_MARGIN_S = 60
"""Slurm may send the warning up to this much late: it looks at time limits about twice a minute."""
_DIRECTIVE_SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_CHARS = 4096
# `deepspeed --launcher slurm` puts these into srun's --export, where a comma ends a value.
_EXPORTED_BY_DEEPSPEED = ("MLFLOW", "NCCL", "PYTHON", "MV2", "UCX")


class SlurmJob(Section):
    """A batch job, before quoting. Paths that begin with `/` are taken as they are, others from `workdir`."""

    kind: Literal["single", "srun", "torchrun", "deepspeed", "sweep", "prepare", "evaluate"] = "srun"
    """The template."""
    name: str = "afd"
    """Job name; also names the log."""
    nodes: Positive = 1
    """Nodes of the job (of each array task, for a sweep)."""
    gpus_per_node: NonNegative = 8
    """GPUs of each node; 0 trains on CPUs."""
    ranks_per_node: Positive = 8
    """Training processes on each node: one per GPU."""
    cpus_per_rank: Positive = 8
    """CPU cores of each rank."""
    time: str = "24:00:00"
    """Time limit, in Slurm's notation."""
    memory: str | None = "0"
    """Memory of each node; `0` is all of it, None leaves the partition's default."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    """Whole nodes, whatever is asked of them."""
    signal_lead_s: Positive = 240
    """How long before the time limit SIGUSR2 comes, s; more than stopping.grace_s + 60."""
    max_requeues: NonNegative = 100
    """Requeues by the job itself; bounds a run that never gets one step further."""
    log_dir: str = "outputs/slurm"
    """Folder of the job's log; must exist when the job starts (`--submit` makes it)."""
    workdir: str
    """The checkout, on a file system that all nodes see."""
    python: str = "python"
    """Interpreter of the environment; its folder goes first in PATH. In a container: the container's."""
    output_dir: str
    """The run's folder, where it leaves its marker."""
    config: str = "configs/quickstart.yaml"
    ds_config: str = "configs/zero3.json"
    overrides: tuple[str, ...] = ()
    """Dotted overrides."""
    sweep: tuple[tuple[str, ...], ...] = ()
    """Further overrides of each array task."""
    sweep_at_once: Positive = 4
    """Array tasks that may run at the same time."""
    stage_to: str | None = None
    """Node-local folder to which the shards are copied before the start."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Further environment variables."""
    interface: str | None = None
    """Network interface of the rendezvous and of gloo, where the nodes have several."""
    container: str | None = None
    """Image to run in."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    """`SOURCE:TARGET` pairs to mount in the container, beside the checkout."""
    health_check: bool = True
    """Check GPUs, a collective, disk and shards before the start."""
    health_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """How long the health check may take, s."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind in ("single", "prepare") and self.nodes != 1:
            raise ValueError(f"--nodes must be 1 for {self.kind}, got {self.nodes}")
        if self.gpus_per_node and self.ranks_per_node != self.gpus_per_node and self.kind != "prepare":
            raise ValueError(
                f"ranks per node must be one per GPU, got {self.ranks_per_node} for {self.gpus_per_node} GPUs"
            )
        limit_s = time_limit_s(self.time)
        if limit_s is not None and limit_s <= self.signal_lead_s:
            raise ValueError(
                f"--time must be longer than --signal-lead-s {self.signal_lead_s}, got {self.time!r} = {limit_s} s: "
                "the job would be asked to stop as it starts"
            )
        if (self.kind == "sweep") != bool(self.sweep):
            raise ValueError(f"sweep needs at least one --sweep line and no other kind has any, got {len(self.sweep)}")
        if self.kind == "deepspeed" and self.container and self.container_runtime == "apptainer":
            raise ValueError("--kind deepspeed starts python itself, not through apptainer: use --kind srun")
        self._check_mounts()
        for name, value in self.environment.items():
            if not _ENVIRONMENT_NAME.fullmatch(name):
                raise ValueError(f"--env must be NAME=VALUE with a plain name, got {name!r}")
            if self.kind == "deepspeed" and name.startswith(_EXPORTED_BY_DEEPSPEED) and "," in value:
                raise ValueError(
                    f"--env {name} must hold no comma with --kind deepspeed, whose launcher passes it through srun "
                    f"--export, got {value!r}: use --kind srun"
                )
        return self

    def _check_mounts(self) -> None:
        """Container runtimes take mounts apart at commas and colons, and pyxis at spaces (NVIDIA/pyxis, issue 133)."""
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,]+(:[^:,]+){1,2}", mount):
                raise ValueError(
                    f"--mount must be SOURCE:TARGET or SOURCE:TARGET:OPTIONS without a comma, got {mount!r}"
                )
        if self.container is None:
            return
        if "," in self.workdir or ":" in self.workdir:
            raise ValueError(f"a checkout in a container must have no comma or colon in its path, got {self.workdir!r}")
        spaced = [path for path in (self.workdir, *self.mounts) if any(each.isspace() for each in path)]
        if self.container_runtime == "pyxis" and spaced:
            raise ValueError(f"pyxis mounts no path with a space, got {spaced[0]!r}")

    @property
    def pyxis_flags(self) -> list[str]:
        """Options of srun that run its tasks in the image; empty without pyxis. Syntax: NVIDIA/pyxis wiki, Usage."""
        if self.container is None or self.container_runtime != "pyxis":
            return []
        return [
            f"--container-image={self.container}",
            f"--container-mounts={','.join(self._all_mounts)}",
            f"--container-workdir={self.workdir}",
            "--no-container-mount-home",
        ]

    @property
    def apptainer_words(self) -> list[str]:
        """The command that runs another one in the image; empty without apptainer. Syntax: apptainer-exec(1)."""
        if self.container is None or self.container_runtime != "apptainer":
            return []
        binds = [word for mount in self._all_mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if self.gpus_per_node else []
        return ["apptainer", "exec", *gpus, "--pwd", self.workdir, *binds, self.container]

    @property
    def _all_mounts(self) -> list[str]:
        return [f"{self.workdir}:{self.workdir}", *self.mounts]


def time_limit_s(text: str) -> int | None:
    """Seconds of a Slurm time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for one without an end.

    Raises:
        ValueError: it is none of these.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise ValueError(f"--time must be like 90, 90:00, 24:00:00, 2-12 or 2-12:30:00, got {text!r}")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def shell_quote(value: object) -> str:
    """One word of a shell.

    Raises:
        ValueError: a newline or another control character, or too long to be meant.
    """
    return shlex.quote(_checked(str(value)))


def directive_quote(value: object) -> str:
    """One word of an `#SBATCH` line.

    sbatch's own parser is no shell's: a backslash also escapes inside single quotes, and does not escape a space
    outside them (found with Slurm 22.05).

    Raises:
        ValueError: as `shell_quote`, and for a value that is empty.
    """
    text = _checked(str(value))
    if not text:
        raise ValueError("a Slurm option's value must not be empty")
    if _DIRECTIVE_SAFE.fullmatch(text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _checked(text: str) -> str:
    bad = next(
        (each for each in text if ord(each) < 32 or 127 <= ord(each) < 160 or 0xD800 <= ord(each) < 0xE000), None
    )
    if bad is not None or "\u2028" in text or "\u2029" in text:
        raise ValueError(f"must hold no newline and no other control character, got {text!r}")
    if len(text) > _MAX_CHARS:
        raise ValueError(f"must have at most {_MAX_CHARS} characters, got {len(text)}: {text[:40]!r}...")
    return text


def render(job: SlurmJob) -> str:
    """The batch script of a job.

    Raises:
        ValueError: a value that cannot be quoted (the message names the option), or the templates are not there.
    """
    path = TEMPLATES / f"{job.kind}.sh.j2"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the Slurm templates are part of a checkout, not of the wheel")
    quoted = {name: _quote_tree(value, name) for name, value in job.model_dump().items()}
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # not HTML: every value is quoted below, and only quoted values are given
    )
    engine.globals.update(_templates_values(job))
    return engine.get_template(path.name).render(**quoted)


def _quote_tree(value: Any, name: str) -> Any:
    """Every string of a value as a shell word; numbers, flags and None as they are."""
    if isinstance(value, str):
        return _named(shell_quote, value, name)
    if isinstance(value, Mapping):
        return {_named(shell_quote, key, name): _quote_tree(child, f"{name} {key}") for key, child in value.items()}
    if isinstance(value, Sequence):
        return [_quote_tree(child, name) for child in value]
    return value


def _templates_values(job: SlurmJob) -> dict[str, Any]:
    """What the templates need beside the quoted fields: directives, and words put together before quoting."""
    raw_directives = {
        "job-name": job.name,
        "output": f"{_literal(job.log_dir)}/{'%x-%A_%a.log' if job.kind == 'sweep' else '%x-%j.log'}",
        "time": job.time,
        "mem": job.memory,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "reservation": job.reservation,
        "chdir": job.workdir,
    }
    directives = {
        name: _named(directive_quote, value, name) for name, value in raw_directives.items() if value is not None
    }
    python_folder = str(PurePosixPath(job.python).parent) if "/" in job.python else None
    staged = [] if job.stage_to is None else [
        f"data.{split}_shards={job.stage_to}/{split}" for split in ("train", "heldout")
    ]  # fmt: skip
    size = [f"--ntasks-per-node={job.ranks_per_node}", f"--cpus-per-task={job.cpus_per_rank}"]
    launcher_args = " ".join(_named(shell_quote, each, "container") for each in [*size, *job.pyxis_flags])
    return {
        "directives": directives,
        "python_folder": None if python_folder is None else _named(shell_quote, python_folder, "python"),
        "staged_overrides": [_named(shell_quote, each, "stage_to") for each in staged],
        "container_flags": [_named(shell_quote, each, "container") for each in job.pyxis_flags],
        "container_words": [_named(shell_quote, each, "container") for each in job.apptainer_words],
        "launcher_args": shell_quote(f"--kill-on-bad-exit=1 {launcher_args}"),
        "num_ranks": job.nodes * job.ranks_per_node,
        "cpus_per_node": job.ranks_per_node * job.cpus_per_rank,
    }


def _literal(folder: str) -> str:
    """A folder without sbatch's file name patterns."""
    return folder.replace("%", "%%")


def _named(quote: Any, value: str, name: str) -> str:
    try:
        return quote(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables of a task that srun started directly; empty for any other process.

    A process is such a task where srun set SLURM_STEP_NUM_TASKS > 1 and no launcher set RANK. MASTER_ADDR and
    MASTER_PORT are kept where they are set, as the batch scripts of `afd launch slurm` do.

    Raises:
        ValueError: several nodes and no MASTER_ADDR.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or size == "1" or "SLURM_PROCID" not in environment:
        return {}
    address = environment.get("MASTER_ADDR")
    if address is None:
        if environment.get("SLURM_STEP_NUM_NODES", "1") != "1":
            raise ValueError(
                "MASTER_ADDR must be set for srun over several nodes, got none: "
                'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
            )
        address = "127.0.0.1"
    port = environment.get("MASTER_PORT") or str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000)
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": str(_tasks_on_node(environment)),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, from Slurm's `4(x2),3`: two nodes with 4 tasks, then one with 3."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, repeated = part.partition("(x")
        counts += [int(tasks)] * int(repeated.rstrip(")") or "1")
    return counts[int(environment.get("SLURM_NODEID", "0"))]
