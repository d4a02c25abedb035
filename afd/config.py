"""The run's configuration: frozen sections with a docstring per field.

DeepSpeed's JSON owns what `deepspeed.initialize` reads (batch sizes, precision, ZeRO, optimizer, clipping); nothing
here repeats it. Builders take a section apart; the mathematics never sees a config object. Reading and writing files
is `afd.config_file`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, field docstrings kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class PhysicsConstants(Section):
    """Everything about the built-in world that a prompt does not say. Lengths in box widths, y down, no air drag."""

    gravity: float = 1.0
    """Downward acceleration, boxes / s^2; any sign."""
    restitution: Fraction = 0.8
    """Speed kept by the normal motion at a wall, the floor or the ceiling."""
    ball_restitution: Fraction = 0.9
    """The same between two balls."""
    duration_s: Annotated[float, Field(gt=0)] = 1.5
    """Length of a clip; round(duration_s * fps) frames, the first at time 0."""
    fps: Positive = 24
    """Frames per second of a teacher video; preparation resamples to `video.fps`, rarely the same on purpose."""
    height: Positive = 64
    """Rows of a frame; preparation resizes to `video.height`."""
    width: Positive = 64
    """Columns of a frame; preparation resizes to `video.width`."""
    supersample: Positive = 4
    """Samples per pixel and axis."""
    soft_edge: Annotated[float, Field(ge=0)] = 0.01
    """Width of the ball's edge; 0 is a hard disc."""
    shading: bool = True
    """Light the ball from the upper left, with a small highlight."""
    noise: Annotated[float, Field(ge=0)] = 0.005
    """Standard deviation of the sensor noise, in [0, 1] units of intensity."""
    background: Fraction = 0.08
    """Grey level of the background."""
    crf: NonNegative = 16
    """H.264 constant rate factor of the finished video."""

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return max(1, round(self.duration_s * self.fps))


class TeacherSection(Section):
    """Which black box is distilled."""

    kind: Literal["physics", "shards"] = "physics"
    """`physics` queries the built-in world once and writes shards; `shards` trains on shards already prepared."""
    physics: PhysicsConstants = PhysicsConstants()
    """The built-in world's constants, read when kind is physics."""
    num_prompts: Positive = 200
    """Training prompts, one teacher video each."""
    num_heldout_prompts: Positive = 64
    """Prompts never trained on, for evaluation."""


class VideoSection(Section):
    """The student's video format; teacher videos are resampled to it."""

    num_frames: Positive = 12
    """Latent frames F of a training clip."""
    fps: Annotated[float, Field(gt=0)] = 8.0
    """Frames per second."""
    height: Positive = 16
    """Pixels."""
    width: Positive = 16
    """Pixels."""


class DataSection(Section):
    """Where the MosaicML shards are."""

    train_shards: Path | None = None
    """Folder of training shards; default `<output_dir>/data/train`, written by the physics teacher if absent."""
    heldout_shards: Path | None = None
    """Folder of held-out shards; default `<output_dir>/data/heldout`."""
    shuffle: bool = True
    """Reshuffle the prompts every epoch."""


class EncodersSection(Section):
    """Frozen networks between pixels, words and the student."""

    codec: Literal["dct", "wan_vae"] = "dct"
    """`dct` is the weight-free codec of the built-in world; `wan_vae` loads AutoencoderKLWan from `vae_path`."""
    vae_path: Path | None = None
    """Folder of a diffusers AutoencoderKLWan, read when codec is wan_vae."""
    text_path: Path | None = None
    """Folder with a tokenizer and a (U)MT5 encoder; default the tiny UMT5 shipped with the quick start."""
    text_len: Positive = 16
    """Text tokens L of every embedding; the student's text_len."""


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
    attention_impl: str | None = None
    """Implementation of block-causal attention; None picks by device."""

    @property
    def dim(self) -> int:
        """Model width: num_heads x head_dim."""
        return self.num_heads * self.head_dim

    @model_validator(mode="after")
    def _consistent(self) -> StudentShape:
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size must start with 1 (frames are generated one by one), got {self.patch_size}")
        if self.head_dim % 2 or self.freq_dim % 2:
            raise ValueError(f"head_dim and freq_dim must be even, got {self.head_dim} and {self.freq_dim}")
        longest = max(self.chunk_frames, self.first_chunk_frames or 0)
        if self.window_frames is not None and self.window_frames < longest:
            raise ValueError(f"window_frames must hold a chunk of {longest} frames, got {self.window_frames}")
        return self


class PretrainSection(Section):
    """How the quick start's base student is made (`afd pretrain`); read by nothing else."""

    num_videos: Positive = 12000
    """Videos of the wrong-physics mixture."""
    gravity_range: tuple[float, float] = (0.0, 1.0)
    """Each video's gravity is drawn uniformly from this range, box / s^2."""
    batch_size: Positive = 16
    """Videos per step, both stages."""
    context_noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of noise on the clean context while training: steadies long rollouts."""
    time_shift: Annotated[float, Field(gt=0)] = 3.0
    """Training times are uniform, warped by this shift."""
    flow_steps: Positive = 4500
    """Optimizer steps of the multi-step flow-matching model."""
    flow_lr: Annotated[float, Field(gt=0)] = 2e-3
    """AdamW learning rate of the first stage."""
    ode_steps: Positive = 16
    """Euler steps of the trajectories that the few-step student is regressed on."""
    distil_steps: Positive = 1000
    """Optimizer steps of the ODE regression."""
    distil_lr: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW learning rate of the second stage."""
    ema_decay: Fraction = 0.995
    """Decay of the averaged weights that each stage hands on."""


class LoRASection(Section):
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: NonNegative = 0
    """Rank r; 0 trains all parameters."""
    alpha: Positive = 256
    """Scale numerator: the update is alpha / r times B A."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """Suffixes of the linear layers that get an adapter."""


class StudentSection(Section):
    """Where the student comes from and how it is trained; its dimensions come from the file."""

    init_from: Path | None = None
    """Student weights (safetensors with its shape); default the base student shipped with the quick start."""
    lora: LoRASection = LoRASection()
    """Adapters; rank 0 is full fine-tuning."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    attention_impl: str | None = None
    """Implementation of block-causal attention; None picks by device."""


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


class DiscriminatorSection(Section):
    """The Bradley-Terry discriminator and its training."""

    shape: DiscriminatorShape = DiscriminatorShape()
    """Dimensions."""
    ds_config: Path = Path("configs/zero2_discriminator.json")
    """DeepSpeed JSON of its engine."""
    warmup_steps: NonNegative = 60
    """Discriminator-only steps before the student moves, on the base student's rollouts."""
    lr_scale: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies the JSON's learning rate once the student moves; 0 freezes D after its warm-up (a stale D)."""
    steps_per_student_step: Positive = 1
    """Discriminator updates per student update."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Bradley-Terry temperature."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability mass moved from "the teacher's video is preferred" to its opposite."""
    input_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise added to teacher and student clips alike; keeps D from memorising pixels."""


class RolloutSection(Section):
    """How the student samples, in training and evaluation."""

    steps: tuple[Positive, ...] = (1000, 500)
    """Denoising steps of 1000 per chunk, decreasing; warped by `shift`."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """Time shift of the sampler's grid."""
    group_size: Positive = 4
    """Rollouts G per prompt; the prompts per step are the JSON's train_batch_size / G."""
    policy: Literal["current", "ema"] = "ema"
    """Whose weights roll out and give v_old: the student's own, or the lagging old policy's."""


class NFTSection(Section):
    """The student's update: DiffusionNFT on its own rollouts."""

    variant: Literal["adaptive", "plain"] = "adaptive"
    """`adaptive` weighs each branch by its detached x0 error; `plain` is the bare squared error."""
    nft_beta: Annotated[float, Field(gt=0)] = 0.5
    """Distance of v+ and v- from v_old along v - v_old."""
    prior_weight: Annotated[float, Field(ge=0)] = 1e-2
    """lambda of the pull towards the frozen initial student; 0 skips its forward pass."""
    baseline: Literal["group", "batch"] = "group"
    """b(y): mean score of the prompt's group or of the batch."""
    normalise_by: Literal["global_std", "group_std", "minmax"] = "global_std"
    """Scale of the advantages; all reduce over every rank."""
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    """Normalised advantage that saturates the optimality weight."""
    time_sampling: Literal["grid", "uniform", "logit_normal"] = "grid"
    """Times of the forward process, one per chunk; `grid` draws the sampler's own."""
    updates_per_rollout: Positive = 1
    """Optimizer steps on each batch of rollouts."""


class AveragesSection(Section):
    """Lagging copies of the student, sharded like it."""

    ema_decay: Fraction = 0.98
    """Decay of the averaged weights that are evaluated and exported."""
    old_policy: Literal["constant", "slow", "delayed"] = "constant"
    """Decay of the old policy: `constant` is old_policy_decay; the others are DiffusionNFT's min(0.001 s, 0.5) and
    0 for s < 75 then min(0.0075 (s - 75), 0.999), s = optimizer steps."""
    old_policy_decay: Fraction = 0.9
    """Decay when old_policy is constant; 0 makes it the previous step's student."""


class EvaluationSection(Section):
    """Measuring on held-out prompts."""

    every: NonNegative = 0
    """Steps between evaluations during training; 0 evaluates base and final student only."""
    seeds_per_prompt: Positive = 2
    """Clips per held-out prompt."""
    samples_every: NonNegative = 100
    """Steps between contact sheets and sample videos; 0 writes them at the end only."""
    num_samples: Positive = 4
    """Prompts in a contact sheet."""


class CheckpointSection(Section):
    """Commits of the whole run."""

    every: NonNegative = 100
    """Steps between commits; 0 commits at the end only."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Commits kept."""


class TrackingSection(Section):
    """Following the run: metrics.jsonl is always written."""

    mlflow: bool = True
    """Send metrics to MLflow too: a SQLite file in the output folder unless MLFLOW_TRACKING_URI is set."""
    experiment: str = "afd"
    """MLflow experiment."""


class RunConfig(Section):
    """Everything about a run except what DeepSpeed's JSON owns."""

    seed: NonNegative = 0
    """Seed of every random choice."""
    num_steps: Positive = 200
    """Student steps."""
    output_dir: Path = Path("outputs/quickstart")
    """Where everything of the run is written."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a rank waits for another before the run dies, s."""
    teacher: TeacherSection = TeacherSection()
    video: VideoSection = VideoSection()
    data: DataSection = DataSection()
    encoders: EncodersSection = EncodersSection()
    student: StudentSection = StudentSection()
    discriminator: DiscriminatorSection = DiscriminatorSection()
    rollout: RolloutSection = RolloutSection()
    nft: NFTSection = NFTSection()
    averages: AveragesSection = AveragesSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    pretrain: PretrainSection = PretrainSection()
