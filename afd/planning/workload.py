"""One run's settings as the planner needs them: shapes, batches, engines, passes per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afd.config import BackboneSection, DiscriminatorShape, LoRASection, RunConfig, StudentShape
from afd.planning.activations import Kernels, PassShape
from afd.planning.parameters import ParameterCount, count_backbone, count_discriminator, count_student
from afd.planning.vlm import VLMPlan, plan_discriminator_vlm

_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size
_DEFAULT_SUB_GROUP = 1_000_000_000
_DEFAULT_PREFETCH = 50_000_000


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
class Workload:
    """A run as the planner sees it.

    Attributes:
        shape, discriminator_shape, latents: of the models and of a clip (C, F, H, W).
        backbone: of a discriminator on the student's frozen backbone; None for the one of discriminator_shape.
        vlm: of a VLM discriminator; None for the others.
        fps: video frames per second, frames: video frames of a clip.
        num_gpus: ranks.
        group_size: rollouts G per prompt.
        rollout_batch: rollouts generated together.
        num_times: denoising passes of the first and of every other chunk.
        lora: adapters of the student; rank 0 is none.
        merges_adapters: rollouts run with the adapters merged into the base.
        is_checkpointed: gradient checkpointing.
        has_old_pass, has_prior_pass: whether v_old and v_ref need a forward of their own.
        gathers_once: `nft.velocities = one_gather`.
        updates_per_rollout, discriminator_steps: optimizer steps of either model per step.
        clips_per_pair: clips D sees per pair: teacher's and student's, a third with the smoothness penalty.
        windows: what D scores of a clip: (windows, latent frames of each).
        copies_keys: see `PassShape`.
        kernels: `fused` on CUDA, `eager` on CPU.
        student, discriminator: engines; None for a discriminator that is not built.
        uses_vae: a Wan VAE decodes samples.
    """

    shape: StudentShape
    discriminator_shape: DiscriminatorShape
    backbone: BackboneSection | None
    vlm: VLMPlan | None
    latents: tuple[int, int, int, int]
    fps: float
    num_gpus: int
    group_size: int
    rollout_batch: int
    num_times: tuple[int, int]
    lora: LoRASection
    merges_adapters: bool
    is_checkpointed: bool
    has_old_pass: bool
    has_prior_pass: bool
    gathers_once: bool
    updates_per_rollout: int
    discriminator_steps: int
    clips_per_pair: int
    windows: tuple[int, int]
    copies_keys: bool
    kernels: Kernels
    student: EngineSettings
    discriminator: EngineSettings | None
    uses_vae: bool

    @property
    def parameters(self) -> ParameterCount:
        """The student's."""
        return count_student(self.shape, self.lora)

    @property
    def lagging_beside(self) -> int:
        """Roles that go through each block beside v: with adapters and one gather, else none."""
        return (self.has_old_pass + self.has_prior_pass) * (self.gathers_once and self.lora.rank > 0)

    @property
    def weights(self) -> int:
        """The student's parameters, the old policy's frozen adapter beside the trained one included."""
        twin = self.parameters.trained if self.lagging_beside and self.has_old_pass else 0
        return self.parameters.total + twin

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

    @property
    def update_pass(self) -> PassShape:
        """One micro batch of the student's update."""
        return PassShape(
            shape=self.shape,
            latents=self.latents,
            batch=self.student.micro,
            width=self.student.width,
            kernels=self.kernels,
            copies_keys=self.copies_keys,
            is_adapted=self.lora.rank > 0,
            lora_rank=self.lora.rank,
        )


def build_workload(
    config: RunConfig,
    shape: StudentShape,
    *,
    latents: tuple[int, int, int, int],
    num_gpus: int,
    engines: tuple[EngineSettings, EngineSettings | None],
    kernels: Kernels,
) -> Workload:
    """Put a configuration, the student's shape and both engines (student, discriminator) together.

    Raises:
        ConfigError: a VLM discriminator's files are not there or do not fit.
    """
    impl = config.student.attention_impl or shape.attention_impl or "chunks"
    return Workload(
        shape=shape,
        discriminator_shape=config.discriminator.shape,
        backbone=config.discriminator.backbone if config.discriminator.kind == "backbone" else None,
        vlm=plan_discriminator_vlm(config) if config.has_discriminator else None,
        latents=latents,
        fps=config.video.fps,
        num_gpus=num_gpus,
        group_size=config.rollout.group_size,
        rollout_batch=config.rollout.batch_size or engines[0].micro,
        num_times=(len(config.rollout.first_chunk_steps or config.rollout.steps), len(config.rollout.steps)),
        lora=config.student.lora,
        merges_adapters=config.rollout.merge_adapters and config.student.lora.rank > 0,
        is_checkpointed=config.student.gradient_checkpointing,
        has_old_pass=config.rollout.policy == "ema",
        has_prior_pass=config.nft.prior_weight > 0,
        gathers_once=config.nft.velocities == "one_gather",
        updates_per_rollout=config.nft.updates_per_rollout,
        discriminator_steps=config.discriminator.steps_per_student_step,
        clips_per_pair=3 if config.discriminator.r1_weight > 0 else 2,
        windows=(config.discriminator.num_clips, config.discriminator.clip_frames or latents[1]),
        copies_keys=impl.partition(":")[0] in ("chunks", "varlen"),
        kernels=kernels,
        student=engines[0],
        discriminator=engines[1],
        uses_vae=config.encoders.codec == "wan_vae",
    )
