"""`afd launch`: batch scripts for Slurm, and what they run before the training command."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from afd.commands.options import add_config
from afd.config import RunConfig
from afd.config_file import ConfigError, first_problem, load_config
from afd.slurm import KINDS, SIGNAL_MARGIN_S, SlurmJob, render

_TEXT_OPTIONS = ("name", "time", "memory", "partition", "account", "qos", "constraint", "reservation", "log_dir",
                 "python", "stage_to", "interface", "container")  # fmt: skip


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    launch = commands.add_parser("launch", help="batch scripts for Slurm, and their checks")
    actions = launch.add_subparsers(required=True, metavar="ACTION")
    _add_slurm(actions)

    check = actions.add_parser("check", help="GPUs, a collective, disk and shards, before a run; one process per rank")
    add_config(check)
    check.add_argument("--gpus-per-node", type=int, default=0, help="GPUs that every node must have")
    check.set_defaults(run=_check)

    stage = actions.add_parser("stage", help="copy the configuration's shards to a node's own disk, verified")
    add_config(stage)
    stage.add_argument("--to", type=Path, required=True, help="folder on the node's disk")
    stage.set_defaults(run=_stage)


def _add_slurm(actions: Any) -> None:
    slurm = actions.add_parser("slurm", help="print a batch script, or send it with --submit")
    add_config(slurm)
    fields = SlurmJob.model_fields
    slurm.add_argument("--kind", choices=KINDS, default="srun", help="template in launch/slurm/ (default: %(default)s)")
    slurm.add_argument("--ds_config", default="configs/zero3.json", help="DeepSpeed JSON of the student's engine")
    for name in _TEXT_OPTIONS:
        default = fields[name].default
        slurm.add_argument(f"--{name.replace('_', '-')}", default=default, help=fields[name].description or name)
    for name in ("nodes", "cpus_per_rank", "signal_lead_s", "max_requeues", "sweep_at_once"):
        option = f"--{name.replace('_', '-')}"
        slurm.add_argument(option, type=int, default=fields[name].default, help=fields[name].description)
    slurm.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each node; 0 trains on CPUs")
    slurm.add_argument("--ranks-per-node", type=int, help="default: one per GPU, or 1")
    slurm.add_argument("--exclusive", action="store_true", help=fields["exclusive"].description)
    slurm.add_argument("--no-health-check", action="store_true", help="start at once, without `afd launch check`")
    slurm.add_argument("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis")
    slurm.add_argument("--mount", action="append", default=[], metavar="SOURCE:TARGET", help="mount in the container")
    slurm.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable")
    slurm.add_argument("--sweep", action="append", default=[], metavar="OVERRIDES",
                       help="one array task: dotted overrides, separated by spaces; repeat")  # fmt: skip
    slurm.add_argument("--submit", action="store_true", help="send it with sbatch instead of printing it")
    slurm.set_defaults(run=_slurm)


def _slurm(arguments: argparse.Namespace) -> None:
    job = _job(arguments)
    script = render(job)
    _check_batches(job)
    if not arguments.submit:
        sys.stdout.write(script)
        return
    Path(job.workdir, job.log_dir).mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("--submit needs sbatch, which is not on PATH: run this on a login node") from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    print(done.stdout.strip().partition(";")[0])


def _job(arguments: argparse.Namespace) -> SlurmJob:
    """The job that the command line describes, checked against the configuration it will run with."""
    config = load_config(arguments.config, arguments.overrides)
    lead = arguments.signal_lead_s
    if lead < config.stopping.grace_s + SIGNAL_MARGIN_S:
        raise ConfigError(
            f"--signal-lead-s must be at least stopping.grace_s + {SIGNAL_MARGIN_S} s = "
            f"{config.stopping.grace_s + SIGNAL_MARGIN_S:g}, got {lead}"
        )
    sweep = tuple(tuple(line.split()) for line in arguments.sweep)
    for line in sweep:
        if mine := [each for each in line if each.startswith("output_dir=")]:
            raise ConfigError(f"--sweep must leave output_dir to the template (OUTPUT_DIR/TASK), got {mine[0]!r}")
        load_config(arguments.config, [*arguments.overrides, *line])
    if arguments.stage_to is not None:
        _check_stageable(config)
    environment = dict(_environment_pair(each) for each in arguments.env)
    values = {name: getattr(arguments, name) for name in _TEXT_OPTIONS}
    ranks = arguments.ranks_per_node or arguments.gpus_per_node or 1
    try:
        return SlurmJob(
            **values,
            kind=arguments.kind,
            nodes=arguments.nodes,
            gpus_per_node=arguments.gpus_per_node,
            ranks_per_node=ranks,
            cpus_per_rank=arguments.cpus_per_rank,
            signal_lead_s=lead,
            max_requeues=arguments.max_requeues,
            sweep_at_once=arguments.sweep_at_once,
            exclusive=arguments.exclusive,
            health_check=not arguments.no_health_check,
            container_runtime=arguments.container_runtime,
            mounts=tuple(arguments.mount),
            environment=environment,
            sweep=sweep,
            workdir=os.getcwd(),
            config=str(arguments.config),
            ds_config=arguments.ds_config,
            overrides=tuple(arguments.overrides),
            output_dir=str(config.output_dir),
        )
    except ValidationError as error:
        *where, message = first_problem(error)
        raise ConfigError(": ".join([*(f"--{each.replace('_', '-')}" for each in where), message])) from None


def _check_batches(job: SlurmJob) -> None:
    """Refuse now what every rank would refuse once the job has waited for its nodes."""
    from afd.planning.refusals import check_batches
    from afd.train.ds_config import load_critic_config, load_ds_config

    if job.kind in ("prepare", "evaluate"):
        return
    for line in job.sweep or ((),):
        config = load_config(Path(job.config), [*job.overrides, *line])
        jsons = [load_ds_config(path) for path in (job.ds_config, config.discriminator.ds_config)]
        check_batches(config, (*jsons, *load_critic_config(config)), num_gpus=job.nodes * job.ranks_per_node)


def _environment_pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--env must read NAME=VALUE, got {text!r}")
    return name, value


def _check(arguments: argparse.Namespace) -> None:
    from afd.train.health import check_health

    for line in check_health(_config(arguments), gpus_per_node=arguments.gpus_per_node):
        print(line)


def _stage(arguments: argparse.Namespace) -> None:
    from afd.data.staging import stage_shards
    from afd.preparation import shard_folders

    config = _config(arguments)
    _check_stageable(config)
    for split, folder in zip(("train", "heldout"), shard_folders(config), strict=True):
        print(f"{split}: {stage_shards(folder, arguments.to, split)}")


def _check_stageable(config: RunConfig) -> None:
    if config.teacher.kind != "shards":
        raise ConfigError(f"--stage-to needs teacher.kind=shards, got {config.teacher.kind!r}")
    if config.data.train_remote or config.data.heldout_remote:
        raise ConfigError(
            "--stage-to copies local shards, got data.train_remote or data.heldout_remote: those are fetched to "
            "data.train_shards and data.heldout_shards, which may be on the nodes' disks"
        )


def _config(arguments: argparse.Namespace) -> RunConfig:
    return load_config(arguments.config, arguments.overrides)
