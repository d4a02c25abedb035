"""The student: its dimensions, where it comes from, how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from afd.config.section import Fraction, NonNegative, Positive, Section
from afd.config.training import LRSchedule

Numerics = Literal["wan", "wan_float64", "diffusers"]


class StudentShape(Section):
    """Dimensions of the causal student; everything the architecture needs to know."""

    in_channels: Positive = 12
    """Latent channels C the model reads."""
    out_channels: Positive = 12
    """Latent channels C the model predicts."""
    patch_size: tuple[Positive, Positive, Positive] = (1, 1, 1)
    """Latent frames, rows and columns per token; temporal patch must be 1."""
    num_layers: Positive = 4
    """Transformer blocks."""
    num_heads: Positive = 2
    """Attention heads."""
    head_dim: Positive = 32
    """Width of a head; even."""
    ffn_dim: Positive = 256
    """Hidden width of the feed-forward."""
    freq_dim: Positive = 64
    """Width of the sinusoidal time embedding; even."""
    text_len: Positive = 16
    """Text tokens L; shorter prompts are zero-padded."""
    text_dim: Positive = 32
    """Text width D."""
    cross_attn_norm: bool = True
    """Affine LayerNorm before cross-attention."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of every normalisation."""
    chunk_frames: Positive = 3
    """Latent frames K generated at once."""
    first_chunk_frames: Positive | None = None
    """Frames of the first chunk when it differs (1 for image-to-video)."""
    window_frames: Positive | None = None
    """Frames a query may see, ending with its own chunk; None sees everything before."""
    sink_frames: NonNegative = 0
    """First frames of the video, always visible, on top of the window."""
    image_dim: Positive | None = None
    """Width of the image encoder's tokens; with it the model has an image embedder and image keys and values."""
    image_tokens: Positive | None = None
    """Image tokens whose positions the model knows (first-and-last-frame models); None for any number."""
    numerics: Numerics = "wan"
    """`wan`: the original's order of roundings, float64 time sinusoid and RoPE angles, rotation in the fused kernel's
    float32. `wan_float64`: the rotation in float64 too, as the original does it (eager, slower). `diffusers`: float32
    sinusoid and tables, RMSNorm rounded once: what `WanTransformer3DModel` computes."""
    attention_impl: str | None = None
    """Implementation of block-causal attention; None picks by device."""

    @property
    def dim(self) -> int:
        """Model width: num_heads x head_dim."""
        return self.num_heads * self.head_dim

    @property
    def condition_channels(self) -> int:
        """Input channels beyond the latents': 0, or 20 for Wan2.1 image-to-video (4 mask + 16 latent)."""
        return self.in_channels - self.out_channels

    @model_validator(mode="after")
    def _consistent(self) -> StudentShape:
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size must start with 1 (frames are generated one by one), got {self.patch_size}")
        if self.in_channels < self.out_channels:
            raise ValueError(f"in_channels must be at least out_channels {self.out_channels}, got {self.in_channels}")
        if self.image_tokens is not None and self.image_dim is None:
            raise ValueError(f"image_tokens needs image_dim, got {self.image_tokens} and None")
        if self.head_dim % 2 or self.freq_dim % 2:
            raise ValueError(f"head_dim and freq_dim must be even, got {self.head_dim} and {self.freq_dim}")
        longest = max(self.chunk_frames, self.first_chunk_frames or 0)
        if self.window_frames is not None and self.window_frames < longest:
            raise ValueError(f"window_frames must hold a chunk of {longest} frames, got {self.window_frames}")
        return self


class PretrainSection(Section):
    """How a base student of the built-in world is made (`afd pretrain`); read by nothing else."""

    num_videos: Positive = 24000
    """Videos of the wrong-physics mixture."""
    gravity_range: tuple[float, float] = (0.0, 1.0)
    """Each video's gravity is drawn uniformly from this range, box / s^2."""
    batch_size: Positive = 16
    """Videos per step, both stages."""
    context_noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of noise on the clean context while training: steadies long rollouts."""
    time_shift: Annotated[float, Field(gt=0)] = 3.0
    """Training times are uniform, warped by this shift."""
    flow_steps: Positive = 9000
    """Optimizer steps of the multi-step flow-matching model."""
    flow_lr: Annotated[float, Field(gt=0)] = 2e-3
    """AdamW learning rate of the first stage."""
    ode_steps: Positive = 16
    """Euler steps of the trajectories that the few-step student is regressed on."""
    distil_steps: Positive = 3000
    """Optimizer steps of the ODE regression."""
    distil_lr: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW learning rate of the second stage."""
    ema_decay: Fraction = 0.995
    """Decay of the averaged weights that each stage hands on."""
    start_from: Path | None = None
    """A student whose weights the first stage goes on from, under the chunks of `student.*`; None starts at random."""


class LoRASection(Section):
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: NonNegative = 0
    """Rank r; 0 trains all parameters."""
    alpha: Positive = 256
    """Scale numerator: the update is alpha / r times B A."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """Suffixes of the linear layers that get an adapter."""


class StudentSection(Section):
    """Where the student comes from and how it is trained.

    Its dimensions come from the file. What is written here must agree with the file, except how it attends
    (`chunk_frames`, `first_chunk_frames`, `window_frames`, `sink_frames`) and `numerics`: those are the run's choice.
    """

    init_from: Path | None = None
    """Student weights in any format of docs/students.md: a diffusers folder, a Self-Forcing .pt, a commit, a
    safetensors file; default the shipped chunk-wise base student."""
    init_weights: Literal["average", "raw"] = "average"
    """Which weights of a file that holds both: the averaged ones (`generator_ema`, a commit's EMA) or the raw ones."""
    init_base: Path | None = None
    """Base weights, where init_from holds LoRA adapters only; they are merged."""
    init_lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """Alpha of the adapters in init_from, where the file does not say."""
    in_channels: Positive | None = None
    """Latent channels C the model reads."""
    out_channels: Positive | None = None
    """Latent channels C the model predicts."""
    patch_size: tuple[Positive, Positive, Positive] | None = None
    """Latent frames, rows and columns per token."""
    num_layers: Positive | None = None
    """Transformer blocks."""
    num_heads: Positive | None = None
    """Attention heads; tensor shapes do not tell."""
    head_dim: Positive | None = None
    """Width of a head."""
    ffn_dim: Positive | None = None
    """Hidden width of the feed-forward."""
    freq_dim: Positive | None = None
    """Width of the sinusoidal time embedding."""
    text_len: Positive | None = None
    """Text tokens L; tensor shapes do not tell."""
    text_dim: Positive | None = None
    """Text width D."""
    cross_attn_norm: bool | None = None
    """Affine LayerNorm before cross-attention."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of every normalisation."""
    chunk_frames: Positive | None = None
    """Latent frames K generated at once."""
    first_chunk_frames: Positive | None = None
    """Frames of the first chunk when it differs (1 for image-to-video)."""
    window_frames: Positive | None = None
    """Frames a query may see, ending with its own chunk; set it for rollouts without end."""
    sink_frames: NonNegative | None = None
    """First frames of the video, always visible, on top of the window."""
    image_dim: Positive | None = None
    """Width of the image encoder's tokens (image-to-video students)."""
    image_tokens: Positive | None = None
    """Image tokens whose positions the model knows (first-and-last-frame students)."""
    numerics: Numerics | None = None
    """Whose rounding to follow; see `StudentShape.numerics`."""
    lora: LoRASection = LoRASection()
    """Adapters; rank 0 is full fine-tuning."""
    lr_schedule: LRSchedule = LRSchedule()
    """Of the student's learning rate."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    attention_impl: str | None = None
    """Implementation of block-causal attention; None picks by device."""

    @property
    def given_shape(self) -> dict[str, Any]:
        """The dimensions written in this section, by `StudentShape`'s names."""
        written = {name: getattr(self, name) for name in StudentShape.model_fields if name != "attention_impl"}
        return {name: value for name, value in written.items() if value is not None}


_RUNS_CHOICE = frozenset({"chunk_frames", "first_chunk_frames", "window_frames", "sink_frames", "numerics"})


def configured_shape(shape: StudentShape, section: StudentSection) -> StudentShape:
    """A file's dimensions with the run's own choice of chunks, window, sink and implementation of attention.

    Raises:
        ValueError: the section contradicts the file about something that its weights were made for.
    """
    given = section.given_shape
    for name, value in given.items():
        if name not in _RUNS_CHOICE and value != getattr(shape, name):
            raise ValueError(f"student.{name} must be {getattr(shape, name)}, as in the student's file, got {value}")
    chosen = {name: given[name] for name in given if name in _RUNS_CHOICE}
    if section.attention_impl is not None:
        chosen["attention_impl"] = section.attention_impl
    return StudentShape(**shape.model_dump() | chosen)
