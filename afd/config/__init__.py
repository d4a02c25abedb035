"""The run's configuration: frozen sections with a docstring per field.

DeepSpeed's JSON owns what `deepspeed.initialize` reads (batch sizes, precision, ZeRO, optimizer, clipping); nothing
here repeats it. Builders take a section apart; the mathematics never sees a config object. Reading and writing files
is `afd.config_file`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from afd.config.discriminator import BackboneSection, DiscriminatorSection, DiscriminatorShape
from afd.config.preparation import PrepareSection
from afd.config.section import NonNegative, Positive, Section
from afd.config.sources import FolderSection, HttpSection, LiveSection, PipelineSection
from afd.config.student import LoRASection, PretrainSection, StudentSection, StudentShape, configured_shape
from afd.config.teacher import DataSection, EncodersSection, PhysicsConstants, TeacherSection, VideoSection
from afd.config.training import (
    AveragesSection,
    CheckpointSection,
    DMDSection,
    EvaluationSection,
    LRSchedule,
    NFTSection,
    RolloutSection,
    StoppingSection,
    TrackingSection,
)
from afd.config.vlm import VLMSection

__all__ = [
    "AveragesSection",
    "BackboneSection",
    "CheckpointSection",
    "DMDSection",
    "DataSection",
    "DiscriminatorSection",
    "DiscriminatorShape",
    "EncodersSection",
    "EvaluationSection",
    "FolderSection",
    "HttpSection",
    "LRSchedule",
    "LiveSection",
    "LoRASection",
    "NFTSection",
    "PhysicsConstants",
    "PipelineSection",
    "PrepareSection",
    "PretrainSection",
    "RolloutSection",
    "RunConfig",
    "Section",
    "StoppingSection",
    "StudentSection",
    "StudentShape",
    "TeacherSection",
    "TrackingSection",
    "VLMSection",
    "VideoSection",
    "configured_shape",
]


class RunConfig(Section):
    """Everything about a run except what DeepSpeed's JSON owns."""

    seed: NonNegative = 0
    """Seed of every random choice."""
    objective: Literal["afd", "sft", "gan", "dmd"] = "afd"
    """What the student minimises: adversarial flow distillation; flow matching on teacher videos; the discriminator's
    gradient through the rollout's last step; the difference of a real and a fake score."""
    num_steps: Positive = 200
    """Student steps."""
    output_dir: Path = Path("outputs/quickstart")
    """Where everything of the run is written."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a rank waits for another before the run dies, s."""
    teacher: TeacherSection = TeacherSection()
    video: VideoSection = VideoSection()
    data: DataSection = DataSection()
    prepare: PrepareSection = PrepareSection()
    encoders: EncodersSection = EncodersSection()
    student: StudentSection = StudentSection()
    discriminator: DiscriminatorSection = DiscriminatorSection()
    rollout: RolloutSection = RolloutSection()
    nft: NFTSection = NFTSection()
    dmd: DMDSection = DMDSection()
    averages: AveragesSection = AveragesSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stopping: StoppingSection = StoppingSection()
    tracking: TrackingSection = TrackingSection()
    pretrain: PretrainSection = PretrainSection()

    @property
    def has_discriminator(self) -> bool:
        """Whether the objective asks a discriminator; else none is built, planned or saved."""
        return self.objective in ("afd", "gan")

    @property
    def has_old_adapter(self) -> bool:
        """Whether the old policy has adapters of its own beside the trained ones: v_old takes the same pass as v."""
        is_shared = self.student.lora.rank > 0 and self.nft.velocities == "one_gather"
        return is_shared and self.rollout.policy == "ema"
