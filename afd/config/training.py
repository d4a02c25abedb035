"""Rollouts, the update, averages, and what happens around the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from afd.config.section import Fraction, NonNegative, Positive, Section


class LRSchedule(Section):
    """Multiplies the learning rate of a DeepSpeed JSON over the student's steps; a `scheduler` there as well is an
    error."""

    kind: Literal["constant", "cosine"] = "constant"
    """`cosine` falls from 1 to final_scale over num_steps."""
    warmup_steps: NonNegative = 0
    """Steps of linear growth from 0 at the start, for either kind."""
    final_scale: Fraction = 0.0
    """Where `cosine` ends."""


class RolloutSection(Section):
    """How the student samples, in training and evaluation."""

    steps: tuple[Positive, ...] = (1000, 500)
    """Denoising steps of 1000 per chunk, decreasing; warped by `shift`."""
    first_chunk_steps: tuple[Positive, ...] | None = None
    """Denoising steps of the first chunk where they differ: it has no context to lean on and sets the scene."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """Time shift of the sampler's grid."""
    context_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Time t at which finished chunks become context: they are noised to it afresh, in rollouts and in training."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "aot_eager"] = "none"
    """Compile the blocks' fixed-shape step with this mode of `torch.compile` (`reduce-overhead` records CUDA graphs;
    `aot_eager` traces only, for tests). Unmeasured on GPUs."""
    merge_adapters: bool = False
    """With LoRA: merge the adapters into the base once per rollout phase, which saves two products per layer and step.
    Exact to rounding in float32; in bf16 the sum is rounded to the base's grid and small updates vanish. Refused
    without LoRA."""
    batch_size: Positive | None = None
    """Rollouts generated together, in evaluations of large models too; None takes the JSON's micro batch (`afd
    evaluate`, which has no JSON, 1), though without gradients many more fit."""
    group_size: Positive = 4
    """Rollouts G per prompt; the prompts per step are the JSON's train_batch_size / G."""
    policy: Literal["current", "ema"] = "ema"
    """Whose weights roll out and give v_old: the student's own, or the lagging old policy's. Objectives gan and dmd
    always roll out the student's own."""


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
    """c: normalised advantage that saturates the optimality weight. With nft_beta it says how far a step may go: a
    state's loss (`plain`) is least at v = v_old + (2 w - 1) / nft_beta (v* - v_old), and 2 w - 1 is the advantage over
    c. Smaller learns faster; too small costs sharpness (docs/study.md)."""
    time_sampling: Literal["grid", "uniform", "logit_normal", "terminal"] = "grid"
    """Times of the forward process, one per chunk; `grid` draws the sampler's own, `terminal` takes its last alone
    (credit for the last denoising step only: an ablation)."""
    noise_coupling: Fraction = 0.0
    """rho: the forward process takes eps' = rho eps + sqrt(1 - rho^2) xi, eps being the noise that the rollout's last
    denoising step started from, xi fresh. 0 is the paper's independent noise. At 1 a one-step student stands where it
    was and there is no signal. Read by objective afd."""
    velocities: Literal["one_gather", "three_passes"] = "one_gather"
    """How v, v_old and v_ref are computed under ZeRO-3; the numbers agree. `one_gather`: with LoRA all three go through
    each block while its frozen weights are gathered once; with full fine-tuning each role is gathered once for all
    micro batches. `three_passes` gathers block by block for every role and micro batch: least memory."""
    updates_per_rollout: Positive = 1
    """Optimizer steps on each batch of rollouts."""


class DMDSection(Section):
    """Distribution matching distillation, read when objective is dmd."""

    real_score: Path | None = None
    """Student file whose velocity stands for the teacher's score. The critic starts from it, and holds these
    first weights beside its own, in shards."""
    ds_config: Path = Path("configs/zero3.json")
    """DeepSpeed JSON of the critic's engine."""
    critic_steps: Positive = 5
    """Critic updates per student update."""
    time_range: tuple[Fraction, Fraction] = (0.02, 0.98)
    """Times at which the scores are compared, before the shift."""


class AveragesSection(Section):
    """Lagging copies of the student, sharded like it."""

    ema_decay: Fraction = 0.98
    """Decay of the averaged weights that are evaluated and exported."""
    old_policy: Literal["constant", "slow", "delayed"] = "constant"
    """Decay of the old policy: `constant` is old_policy_decay; the others are DiffusionNFT's min(0.001 s, 0.5) and
    0 for s < 75 then min(0.0075 (s - 75), 0.999), s = optimizer steps."""
    old_policy_decay: Fraction = 0.9
    """Decay when old_policy is constant; 0 makes it the previous step's student, 1 keeps it the initial one (rollouts
    never follow the student: the off-policy ablation)."""


class EvaluationSection(Section):
    """Measuring on held-out prompts."""

    every: NonNegative = 0
    """Steps between evaluations during training; 0 evaluates base and final student only."""
    max_prompts: Positive = 256
    """The first so many held-out videos are used; they stay in memory, in float32."""
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


class StoppingSection(Section):
    """What happens when the run is asked to stop (SIGTERM, SIGUSR2) or hangs."""

    grace_s: Annotated[float, Field(gt=0)] = 120.0
    """From the signal to the end of the process, s: a step with its evaluation, a commit and MLflow's last delivery
    must fit. A run that is not through by then dumps its stacks and ends; Slurm's `--signal` lead and GraceTime belong
    above it."""
    hang_after_s: Annotated[float, Field(ge=0)] = 900.0
    """A step that takes longer dumps every thread's stack, s; 0 never does. Below timeout_s, which ends the run."""
