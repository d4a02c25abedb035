"""A whole plan from a configuration and its DeepSpeed JSONs, and the cheapest change when it does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from afd.config import RunConfig, StudentShape, configured_shape
from afd.config_file import ConfigError
from afd.models.encoders import latent_shape, student_path
from afd.models.weights import read_student_shape
from afd.planning.communication import plan_transfers
from afd.planning.hardware import ASSUMED, GPUS_PER_NODE, Gpu, Interconnect
from afd.planning.memory import GIB, Memory, plan_memory
from afd.planning.refusals import check_divides, check_fits
from afd.planning.timing import Step, predict_step
from afd.planning.workload import Workload, build_workload, engine_settings

DSConfigs = tuple[dict[str, Any], ...]
"""JSONs of the engines: the student's, the discriminator's and, for objective dmd, the critic's."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    gpu: Gpu
    network: Interconnect
    num_gpus: int
    gpus_per_node: int = GPUS_PER_NODE

    @property
    def usable(self) -> int:
        """Bytes that allocations may fill on one GPU."""
        return int(self.gpu.memory * ASSUMED.usable_memory)


@dataclass(frozen=True)
class Plan:
    """What a run needs on a machine."""

    machine: Machine
    workload: Workload
    memory: Memory
    step: Step

    @property
    def fits(self) -> bool:
        """Whether the largest phase fits the usable memory."""
        return self.memory.peak <= self.machine.usable


@dataclass(frozen=True)
class Remedy:
    """One change that makes a plan fit: what to set, the peak and the seconds it leads to."""

    change: str
    plan: Plan


def planned_shape(config: RunConfig) -> StudentShape:
    """The student's shape: the weights file's where it is on this machine, else the YAML's alone.

    Raises:
        ConfigError: no file, and the YAML does not say everything.
    """
    path = student_path(config.student)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return configured_shape(read_student_shape(path), config.student)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    given = config.student.given_shape
    needed = ("in_channels", "out_channels", "patch_size", "num_layers", "num_heads", "head_dim", "ffn_dim", "text_len")
    missing = [name for name in needed if name not in given]
    if missing:
        raise ConfigError(
            f"student.{missing[0]} must be written in the YAML to plan without {path}, which is not a student's file"
        )
    return StudentShape(**given)


def critic_shape(config: RunConfig, shape: StudentShape) -> StudentShape:
    """The shape of objective dmd's critic and real score: the file's where it is on this machine, else the student's.

    Raises:
        ConfigError: the file is no student's.
    """
    path = config.dmd.real_score
    if path is None or not path.is_file():
        return shape
    try:
        return read_student_shape(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_plan(config: RunConfig, shape: StudentShape, ds_configs: DSConfigs, machine: Machine) -> Plan:
    """Plan a run.

    Raises:
        ConfigError: something does not divide.
    """
    encoders = config.encoders
    if encoders.vae_path is not None and not encoders.vae_path.is_dir():
        encoders = encoders.model_copy(update={"vae_path": None})  # planned before it is on this machine
    try:
        latents = latent_shape(encoders, config.video)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    batches = check_divides(
        config, shape, latents, ds_configs, num_gpus=machine.num_gpus, gpus_per_node=machine.gpus_per_node
    )
    student = engine_settings(ds_configs[0], batches[0])
    discriminator = engine_settings(ds_configs[1], batches[1]) if batches[1] else None
    critic = (critic_shape(config, shape), engine_settings(ds_configs[2], batches[2])) if batches[2] else None
    work = build_workload(
        config, shape, latents=latents, num_gpus=machine.num_gpus, engines=(student, discriminator), kernels="fused",
        critic=critic,
    )  # fmt: skip
    step = predict_step(work, machine.gpu, machine.network, gpus_per_node=machine.gpus_per_node)
    return Plan(machine, work, plan_memory(work), step)


def refuse_what_does_not_fit(plan: Plan) -> None:
    """Raise the sentence that the trainer's start-up would raise.

    Raises:
        ConfigError: the largest phase does not fit.
    """
    check_fits(plan.memory, plan.machine.usable, f"{plan.machine.gpu.name}")


def remedies(config: RunConfig, shape: StudentShape, ds_configs: DSConfigs, machine: Machine) -> list[Remedy]:
    """Single changes, then pairs of them, that make a plan fit: cheapest step first; empty where none is known."""
    singles = list(_changes(config, ds_configs))
    found = list(_fitting(config, shape, ds_configs, machine, [(each,) for each in singles]))
    if not found:
        pairs = [(a, b) for i, a in enumerate(singles) for b in singles[i + 1 :]]
        found = list(_fitting(config, shape, ds_configs, machine, pairs))
    return sorted(found, key=lambda remedy: remedy.plan.step.seconds / remedy.plan.workload.rollouts)


@dataclass(frozen=True)
class _Change:
    text: str
    config: dict[str, dict[str, Any]]
    ds: dict[str, Any]


def _changes(config: RunConfig, ds_configs: DSConfigs) -> Iterator[_Change]:
    """What may be changed, where it is not so already."""
    student, zero = config.student, ds_configs[0].get("zero_optimization", {})
    if not student.gradient_checkpointing:
        yield _Change("student.gradient_checkpointing=true", {"student": {"gradient_checkpointing": True}}, {})
    if (student.attention_impl or "chunks").partition(":")[0] in ("chunks", "varlen"):
        yield _Change("student.attention_impl=triton", {"student": {"attention_impl": "triton"}}, {})
    if not student.lora.rank:
        lora = student.lora.model_copy(update={"rank": 256, "alpha": 256})
        yield _Change("student.lora.rank=256 student.lora.alpha=256", {"student": {"lora": lora}}, {})
    if config.nft.velocities == "one_gather":
        yield _Change("nft.velocities=three_passes", {"nft": {"velocities": "three_passes"}}, {})
    if config.rollout.group_size > 2:
        half = config.rollout.group_size // 2
        yield _Change(
            f"fewer rollouts: rollout.group_size={half} and half of train_batch_size in all JSONs",
            {"rollout": {"group_size": half}},
            {"batch": 0.5},
        )
    if ds_configs[0].get("train_micro_batch_size_per_gpu", 1) > 1:
        yield _Change("train_micro_batch_size_per_gpu 1 in the student's JSON", {}, {"micro": 1})
    if zero.get("stage") != 3:
        yield _Change("ZeRO stage 3 in the student's JSON", {}, {"zero": {"stage": 3}})
    if zero.get("zero_hpz_partition_size", 1) > 1:
        yield _Change("no zero_hpz_partition_size in the student's JSON", {}, {"zero": {"zero_hpz_partition_size": 1}})
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        yield _Change(
            "offload_optimizer to cpu (configs/zero3_offload.json)",
            {},
            {"zero": {"offload_optimizer": {"device": "cpu"}}},
        )
    if zero.get("offload_param", {}).get("device", "none") == "none":
        yield _Change("offload_param to cpu in the student's JSON", {}, {"zero": {"offload_param": {"device": "cpu"}}})


def _fitting(
    config: RunConfig, shape: StudentShape, ds_configs: DSConfigs, machine: Machine, tried: list[tuple[_Change, ...]]
) -> Iterator[Remedy]:
    for changes in tried:
        changed, pair = config, ds_configs
        for change in changes:
            changed, pair = _applied(changed, pair, change)
        try:
            plan = make_plan(changed, shape, pair, machine)
        except ConfigError:
            continue  # what does not divide is no remedy
        if plan.fits:
            yield Remedy(" and ".join(change.text for change in changes), plan)


def _applied(config: RunConfig, ds_configs: DSConfigs, change: _Change) -> tuple[RunConfig, DSConfigs]:
    sections = {name: getattr(config, name).model_copy(update=new) for name, new in change.config.items()}
    student, *others = copy.deepcopy(ds_configs)
    student.setdefault("zero_optimization", {}).update(change.ds.get("zero", {}))
    if "micro" in change.ds:
        student["train_micro_batch_size_per_gpu"] = change.ds["micro"]
        student.pop("gradient_accumulation_steps", None)
    if "batch" in change.ds:
        for each in (student, *others):
            each["train_batch_size"] = int(each["train_batch_size"] * change.ds["batch"])
    return config.model_copy(update=sections), (student, *others)


def as_json(plan: Plan, price: float) -> dict[str, Any]:
    """Everything about a plan, for `--json`."""
    work, memory, step = plan.workload, plan.memory, plan.step
    passes, critic = work.passes, work.critic
    return {
        "gpu": plan.machine.gpu.name,
        "gpus": plan.machine.num_gpus,
        "interconnect": plan.machine.network.name,
        "parameters": {
            "student": work.parameters.total,
            "trained": work.parameters.trained,
            "discriminator": work.discriminator_parameters.total,
            **({"critic": critic.parameters.total, "real_score": critic.parameters.total} if critic else {}),
        },
        "objective": passes.objective,
        "mean_step": {
            "denoising_steps": passes.mean_times,
            "updates_of_the_student": float(passes.updates * passes.update_share),
            "forwards_without_gradient_in_an_update": float(passes.lagging + passes.repeats),
        },
        "rollouts_per_step": work.rollouts,
        "memory": {
            "held": memory.held,
            "phases": memory.phases,
            "host_per_rank": memory.host,
            "peak": memory.peak,
            "peak_phase": memory.peak_phase,
            "usable": plan.machine.usable,
            "fits": plan.fits,
        },
        "phases": {name: asdict(phase) for name, phase in step.phases.items()},
        "collectives": {
            name: [asdict(transfer) for transfer in transfers] for name, transfers in plan_transfers(work).items()
        },
        "seconds_per_step": step.seconds,
        "mfu": step.mfu,
        "tokens_per_second": step.tokens_per_second,
        "videos_per_day": step.videos_per_day,
        "dollars_per_1000_steps": step.cost(price),
        "assumed": asdict(ASSUMED),
    }


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"
