"""One run's settings as the planner needs them: shapes, batches, engines, passes per step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from afd.config import BackboneSection, DiscriminatorShape, LoRASection, RunConfig, StudentShape
from afd.planning.activations import Kernels, PassShape
from afd.planning.parameters import (
    ParameterCount,
    StudentTensors,
    backbone_tensors,
    count_backbone,
    count_discriminator,
    count_student,
    discriminator_tensors,
    student_tensors,
)
from afd.planning.passes import StepPasses, step_passes
from afd.planning.vlm import VLMPlan, plan_discriminator_vlm

_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size
_DEFAULT_SUB_GROUP = 1_000_000_000
_DEFAULT_PREFETCH = 50_000_000
_AVERAGES = 3  # of the student: old policy, evaluated weights, initial weights; every objective keeps them


@dataclass(frozen=True)
class EngineSettings:
    """What of an engine's DeepSpeed JSON decides memory and traffic.

    Attributes:
        stage: ZeRO stage.
        width: bytes of a weight, an activation and a communicated gradient.
        grad_width: bytes of an accumulated gradient.
        is_fused: the optimizer makes no temporaries.
        micro, accumulation: clips in a micro batch, micro batches in a step.
        offloads_optimizer, offloads_weights: to the host.
        reduce_bucket, prefetch, sub_group: elements.
        overlaps: reduces gradients beside the backward; stage 2 then has two buckets.
        hpz: ranks that share a second copy of the weights (ZeRO++); 1 is off.
    """

    stage: int
    width: int
    grad_width: int
    is_fused: bool
    micro: int
    accumulation: int
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    reduce_bucket: int = _DEFAULT_BUCKET
    prefetch: int = _DEFAULT_PREFETCH
    sub_group: int = _DEFAULT_SUB_GROUP
    hpz: int = 1
    overlaps: bool = False


def engine_settings(ds_config: dict[str, Any], batch: tuple[int, int, int]) -> EngineSettings:
    """Read one engine's JSON; `batch` is (global, micro, accumulation) as `batch_arithmetic` solved it."""
    zero = ds_config.get("zero_optimization", {})
    half = any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype")
    width = 2 if half else 4
    return EngineSettings(
        stage=zero.get("stage", 0),
        width=width,
        grad_width=4 if accumulated == "fp32" else width,
        is_fused=bool(ds_config.get("optimizer", {}).get("params", {}).get("fused")),
        micro=batch[1],
        accumulation=batch[2],
        offloads_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offloads_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        reduce_bucket=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", _DEFAULT_PREFETCH)),
        sub_group=int(zero.get("sub_group_size", _DEFAULT_SUB_GROUP)),
        hpz=int(zero.get("zero_hpz_partition_size", 1)),
        overlaps=bool(zero.get("overlap_comm", zero.get("stage") == 3)),
    )


@dataclass(frozen=True)
class Learner:
    """A velocity model with an engine of its own: the student, or objective dmd's critic.

    Attributes:
        shape: the model's.
        engine: its.
        lora: adapters; rank 0 is none.
        frozen_adapters: copies of them that are never trained, beside them in every block.
        is_checkpointed: gradient checkpointing.
        copies_keys: see `PassShape`.
        teacher_forcing: it is trained on [clean | noisy]; else on noised clips alone.
        averages: float32 copies of what is trained.
    """

    shape: StudentShape
    engine: EngineSettings
    lora: LoRASection
    frozen_adapters: int = 0
    is_checkpointed: bool = False
    copies_keys: bool = True
    teacher_forcing: bool = False
    averages: int = 0

    @property
    def parameters(self) -> ParameterCount:
        """Without the frozen adapters."""
        return count_student(self.shape, self.lora)

    @property
    def weights(self) -> int:
        """All parameters."""
        return self.parameters.total + self.frozen_adapters * self.parameters.num_layers * self.parameters.adapter

    @property
    def tensors(self) -> StudentTensors:
        """Its parameters one by one, without the frozen adapters."""
        return student_tensors(self.shape, self.lora)

    @property
    def num_tensors(self) -> int:
        """Parameters, each gathered alone where all are made whole at once."""
        tensors = self.tensors
        block = len(tensors.block) + len(tensors.adapter) * (1 + self.frozen_adapters)
        return len(tensors.before) + len(tensors.after) + self.shape.num_layers * block


@dataclass(frozen=True)
class Workload:
    """A run as the planner sees it.

    Attributes:
        passes: what a step does.
        learner: the student.
        critic: objective dmd's; its real score has the same shape. None for the other objectives.
        discriminator_shape, latents: of the discriminator and of a clip (C, F, H, W).
        backbone: of a discriminator on the student's frozen backbone; None for the one of discriminator_shape.
        vlm: of a VLM discriminator; None for the others.
        fps: video frames per second, frames: video frames of a clip.
        num_gpus: ranks.
        group_size: rollouts G per prompt.
        rollout_batch: rollouts generated together.
        merges_adapters: rollouts run with the adapters merged into the base.
        gathers_once: `nft.velocities = one_gather`.
        clips_per_pair: clips D sees per pair: teacher's and student's, a third with the smoothness penalty.
        windows: what D scores of a clip: (windows, latent frames of each).
        kernels: `fused` on CUDA, `eager` on CPU.
        discriminator: its engine; None for a discriminator that is not built.
        uses_vae: a Wan VAE decodes samples.
    """

    passes: StepPasses
    learner: Learner
    critic: Learner | None
    discriminator_shape: DiscriminatorShape
    backbone: BackboneSection | None
    vlm: VLMPlan | None
    latents: tuple[int, int, int, int]
    fps: float
    num_gpus: int
    group_size: int
    rollout_batch: int
    merges_adapters: bool
    gathers_once: bool
    clips_per_pair: int
    windows: tuple[int, int]
    kernels: Kernels
    discriminator: EngineSettings | None
    uses_vae: bool

    @property
    def longest(self) -> Workload:
        """The same with a step that does everything: see `afd.planning.passes`."""
        return replace(self, passes=self.passes.longest)

    @property
    def shape(self) -> StudentShape:
        """The student's."""
        return self.learner.shape

    @property
    def student(self) -> EngineSettings:
        """The student's engine."""
        return self.learner.engine

    @property
    def lora(self) -> LoRASection:
        """The student's adapters."""
        return self.learner.lora

    @property
    def parameters(self) -> ParameterCount:
        """The student's."""
        return self.learner.parameters

    @property
    def lagging_beside(self) -> int:
        """Roles that go through each block beside v: with adapters and one gather, else none."""
        return self.passes.lagging * (self.gathers_once and self.lora.rank > 0)

    @property
    def discriminator_parameters(self) -> ParameterCount:
        """The discriminator's; none where it is not built."""
        if self.discriminator is None:
            return ParameterCount(0, 0, 0)
        if self.vlm is not None:
            return ParameterCount(0, self.vlm.total - self.vlm.trained, 0, heads=self.vlm.trained)
        if self.backbone is not None:
            return count_backbone(self.shape, self.backbone)
        return count_discriminator(self.discriminator_shape)

    @property
    def discriminator_tensors(self) -> tuple[list[int], list[int]]:
        """Elements of a latent or backbone discriminator's parameter tensors: frozen, trained."""
        if self.backbone is not None:
            return backbone_tensors(self.shape, self.backbone)
        block, outside = discriminator_tensors(self.discriminator_shape)
        return [], block * self.discriminator_shape.num_layers + outside

    @property
    def window_latents(self) -> tuple[int, int, int, int]:
        """(C, K, H, W) of what D scores at once."""
        channels, _, height, width = self.latents
        return channels, self.windows[1], height, width

    @property
    def rollouts_per_gpu(self) -> int:
        """N on one rank."""
        return self.student.micro * self.student.accumulation

    @property
    def rollouts(self) -> int:
        """N over all ranks."""
        return self.rollouts_per_gpu * self.num_gpus

    def training_pass(self, learner: Learner) -> PassShape:
        """One micro batch of a learner's update."""
        return PassShape(
            shape=learner.shape,
            latents=self.latents,
            batch=learner.engine.micro,
            width=learner.engine.width,
            kernels=self.kernels,
            copies_keys=learner.copies_keys,
            is_adapted=learner.lora.rank > 0,
            lora_rank=learner.lora.rank,
            teacher_forcing=learner.teacher_forcing,
        )

    @property
    def score_passes(self) -> list[PassShape]:
        """Forwards without gradient of the critic and of the real score over a micro batch of the student's update."""
        return [replace(self.training_pass(self.critic), batch=self.student.micro)] * 2 if self.critic else []


def build_workload(
    config: RunConfig,
    shape: StudentShape,
    *,
    latents: tuple[int, int, int, int],
    num_gpus: int,
    engines: tuple[EngineSettings, EngineSettings | None],
    kernels: Kernels,
    critic: tuple[StudentShape, EngineSettings] | None = None,
) -> Workload:
    """Put a configuration, the student's shape and both engines (student, discriminator) together.

    Args:
        config: the run's.
        shape: the student's.
        latents: (C, F, H, W) of a clip.
        num_gpus: ranks.
        engines: the student's and the discriminator's.
        kernels: `fused` on CUDA, `eager` on CPU.
        critic: shape and engine of objective dmd's; not read for the others.
    Raises:
        ConfigError: a VLM discriminator's files are not there or do not fit.
    """
    lora, section = config.student.lora, config.discriminator
    assert config.objective != "dmd" or critic is not None
    return Workload(
        passes=step_passes(config),
        learner=Learner(
            shape,
            engines[0],
            lora,
            frozen_adapters=int(config.has_old_adapter),
            is_checkpointed=config.student.gradient_checkpointing,
            copies_keys=_copies_keys(config.student.attention_impl or shape.attention_impl),
            teacher_forcing=True,
            averages=_AVERAGES,
        ),
        critic=_critic(config, *critic) if critic is not None and config.objective == "dmd" else None,
        discriminator_shape=section.shape,
        backbone=section.backbone if section.kind == "backbone" else None,
        vlm=plan_discriminator_vlm(config) if config.has_discriminator else None,
        latents=latents,
        fps=config.video.fps,
        num_gpus=num_gpus,
        group_size=config.rollout.group_size,
        rollout_batch=config.rollout.batch_size or engines[0].micro,
        merges_adapters=config.rollout.merge_adapters and lora.rank > 0,
        gathers_once=config.nft.velocities == "one_gather",
        clips_per_pair=3 if section.r1_weight > 0 else 2,
        windows=(section.num_clips, section.clip_frames or latents[1]),
        kernels=kernels,
        discriminator=engines[1],
        uses_vae=config.encoders.codec == "wan_vae",
    )


def _copies_keys(impl: str | None) -> bool:
    return (impl or "chunks").partition(":")[0] in ("chunks", "varlen")


def _critic(config: RunConfig, shape: StudentShape, engine: EngineSettings) -> Learner:
    """All of its weights learn, it recomputes its blocks where the student does, and its one average, the real score,
    stays where it started."""
    return Learner(
        shape,
        engine,
        LoRASection(),
        is_checkpointed=config.student.gradient_checkpointing,
        copies_keys=_copies_keys(shape.attention_impl),
        averages=1,
    )
