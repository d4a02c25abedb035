"""The discriminator and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd.config.section import Fraction, NonNegative, Positive, Section
from afd.config.training import LRSchedule
from afd.config.vlm import VLMSection


class DiscriminatorShape(Section):
    """Dimensions of the latent discriminator."""

    in_channels: Positive = 12
    """Latent channels C."""
    patch_size: tuple[Positive, Positive, Positive] = (3, 1, 1)
    """Latent frames, rows and columns per token."""
    num_layers: Positive = 3
    """Transformer blocks."""
    num_heads: Positive = 4
    """Attention heads."""
    head_dim: Positive = 16
    """Width of a head; even."""
    ffn_dim: Positive = 256
    """Hidden width of the feed-forward."""
    text_dim: Positive = 32
    """Text width D."""

    @property
    def dim(self) -> int:
        """Model width: num_heads x head_dim."""
        return self.num_heads * self.head_dim


class BackboneSection(Section):
    """Heads on a frozen copy of the student's initial backbone (`kind: backbone`)."""

    layers: tuple[NonNegative, ...] | None = None
    """Blocks, counted from 0 and ascending, whose outputs are judged; None takes the ends of three equal parts. Blocks
    behind the last one are not loaded."""
    time: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Diffusion time t that the backbone is told; clips are not noised to it (that is discriminator.input_noise)."""
    head_width: Annotated[int, Field(gt=0, multiple_of=32)] = 64
    """Channels inside a head."""
    num_queries: Positive = 4
    """Learned queries that pool a clip, per head."""
    gradient_checkpointing: bool = False
    """Recompute blocks when the gradient must reach the clips (objective gan); nothing else keeps activations."""

    @model_validator(mode="after")
    def _ascending(self) -> BackboneSection:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers must be ascending block numbers, got {list(self.layers)}")
        return self

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """The blocks that are read, of a student with num_layers.

        Raises:
            ValueError: a block that the student does not have.
        """
        if self.layers is None:
            return tuple(sorted({max(1, round(num_layers * third / 3)) - 1 for third in (1, 2, 3)}))
        if self.layers[-1] >= num_layers:
            raise ValueError(
                f"discriminator.backbone.layers must be below {num_layers}, the student's number of blocks, "
                f"got {list(self.layers)}"
            )
        return self.layers


class DiscriminatorSection(Section):
    """The Bradley-Terry discriminator and its training."""

    kind: Literal["latent", "backbone", "vlm"] = "latent"
    """What scores clips: `latent`, a transformer on latents trained from scratch; `backbone`, heads on features of a
    frozen copy of the initial student; `vlm`, a vision-language model with adapters, on decoded frames and the
    prompt's words."""
    shape: DiscriminatorShape = DiscriminatorShape()
    """Dimensions of `kind: latent`."""
    backbone: BackboneSection = BackboneSection()
    """Of `kind: backbone`."""
    clip_frames: Positive | None = None
    """Latent frames of a window: a long video's score is the mean over num_clips of them. None scores it whole."""
    num_clips: Positive = 1
    """Windows per video: anywhere, drawn anew for each pair, when D trains; evenly spaced when it scores."""
    vlm: VLMSection = VLMSection()
    ds_config: Path = Path("configs/zero2_discriminator.json")
    """DeepSpeed JSON of its engine."""
    warmup_steps: NonNegative = 60
    """Discriminator-only steps before the student moves, on the base student's rollouts."""
    warmup_updates: Positive = 1
    """Discriminator updates per warm-up step: the student stands still, so its rollouts do not age."""
    lr_scale: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies the JSON's learning rate once the student moves; 0 freezes D after its warm-up (a stale D)."""
    lr_schedule: LRSchedule = LRSchedule()
    """Of its learning rate once the student moves, on top of lr_scale."""
    steps_per_student_step: Positive = 1
    """Discriminator updates per student update."""
    loss: Literal["bradley_terry", "gan"] = "bradley_terry"
    """`bradley_terry` compares a prompt's teacher clip and rollout; `gan` classifies each clip alone."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Bradley-Terry temperature; `gan` has none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability mass moved from "the teacher's video is preferred" (or, with `gan`, "is real") to its opposite."""
    input_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise added to teacher and student clips alike; keeps D from memorising pixels."""
    r1_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the smoothness penalty mean (D(x + r1_sigma n) - D(x))^2 / r1_sigma^2 on teacher clips: a zero-centred
    gradient penalty (R1) by finite differences, which needs no second derivative."""
    r1_sigma: Annotated[float, Field(gt=0)] = 0.05
    """Standard deviation of that perturbation."""
    hold_above: Fraction = 1.0
    """No update on a step whose pairs D already ranks with more than this accuracy; 1 never holds."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Expected share of pairs whose rollout comes from an earlier step, against cycling."""
    replay_steps: Positive = 8
    """Steps of rollouts kept for that, on each rank's CPU."""
    probe_pairs: NonNegative = 8
    """Held-out teacher clips, each with the initial student's rollout, that D is measured on and never trained on:
    what changes there is D alone. 0 measures nothing."""
    probe_every: Positive = 10
    """Steps between two measurements of the probe set."""
