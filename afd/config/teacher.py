"""What is distilled, and the data made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from afd.config.section import Fraction, NonNegative, Positive, Section
from afd.config.sources import FolderSection, HttpSection, LiveSection, PipelineSection


class PhysicsConstants(Section):
    """Everything about the built-in world that a prompt does not say. Lengths in box widths, y down, no air drag."""

    gravity: float = 1.0
    """Downward acceleration, boxes / s^2; any sign."""
    restitution: Fraction = 0.8
    """Speed kept by the normal motion at a wall, the floor or the ceiling."""
    ball_restitution: Fraction = 0.9
    """The same between two balls."""
    spread: Fraction = 1.0
    """How much a prompt leaves open: 1 draws start, speed, angle and radius from the prompt's whole bands; at 0 they
    follow from the prompt, which then has one video."""
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

    kind: Literal["physics", "folder", "http", "pipeline", "shards"] = "physics"
    """`physics` queries the built-in world once and writes shards; `folder`, `http` and `pipeline` give `afd prepare`
    finished videos (docs/teachers.md); `shards` trains on shards already prepared."""
    physics: PhysicsConstants = PhysicsConstants()
    """The built-in world's constants, read when kind is physics."""
    folder: FolderSection = FolderSection()
    """Read when kind is folder."""
    http: HttpSection = HttpSection()
    """Read when kind is http."""
    pipeline: PipelineSection = PipelineSection()
    """Read when kind is pipeline."""
    prompts: Path | None = None
    """Prompt list for http and pipeline: one a line (.txt), or .jsonl or .json with `prompt`; an `_extended` twin
    beside it gives the wording that is asked for."""
    videos_per_prompt: Positive = 1
    """Videos per prompt of physics (training prompts), http and pipeline, with consecutive seeds."""
    first_seed: NonNegative = 0
    """Seed of a prompt's first video."""
    licence: str = ""
    """Licence tag of every video without its own."""
    live: LiveSection = LiveSection()

    @model_validator(mode="after")
    def _live_needs_a_teacher(self) -> Self:
        if self.live.enabled and self.kind == "shards":
            raise ValueError("live.enabled needs a teacher to ask: kind must not be shards")
        return self

    num_prompts: Positive = 200
    """Training prompts, videos_per_prompt teacher videos each."""
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
    train_remote: str | None = None
    """Where the training shards are fetched from as they are needed: a folder, file://, s3://, gs://, oci://, hf:// and
    whatever else mosaicml-streaming has a downloader for. `train_shards` is then the local copy."""
    heldout_remote: str | None = None
    """The same for the held-out shards."""
    cache_limit_gib: Annotated[float, Field(gt=0)] | None = None
    """Size that the local copy of `train_remote` may have; what was not read for longest is dropped, and fetched again
    when it is needed. None keeps everything."""
    verify: Literal["start", "first_use"] = "start"
    """Check local shards before the run starts, or each when it is first read; remote ones are checked on arrival."""
    shuffle: bool = True
    """Reshuffle the prompts every epoch."""
    shuffle_block: Positive = 1 << 18
    """Samples shuffled together; smaller blocks read fewer remote shards at a time."""
    read_ahead: NonNegative = 2
    """Batches read in the background while a step computes; 0 reads when asked."""

    @model_validator(mode="after")
    def _only_a_copy_has_a_limit(self) -> Self:
        if self.cache_limit_gib is not None and self.train_remote is None:
            raise ValueError("cache_limit_gib needs train_remote: shards that are only here are never dropped")
        return self

    @property
    def cache_limit(self) -> int | None:
        """`cache_limit_gib` in bytes."""
        return None if self.cache_limit_gib is None else int(self.cache_limit_gib * 2**30)


class EncodersSection(Section):
    """Frozen networks between pixels, words and the student."""

    codec: Literal["dct", "wan_vae"] = "dct"
    """`dct` is the weight-free codec of the built-in world; `wan_vae` loads AutoencoderKLWan from `vae_path`."""
    vae_path: Path | None = None
    """Folder of a diffusers AutoencoderKLWan or of a pipeline with one, read when codec is wan_vae."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the VAE computes in."""
    vae_tile: Positive | None = None
    """Side in pixels of the overlapping tiles that larger frames are encoded and decoded in; None takes them whole."""
    text_path: Path | None = None
    """Folder with a tokenizer and a UMT5 encoder, or of a diffusers pipeline with both; default the tiny UMT5 shipped
    with the quick start."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the text encoder computes in."""
    text_len: Positive = 16
    """Text tokens L of every embedding; the student's text_len."""
    image_path: Path | None = None
    """Folder of a CLIP vision encoder with its processor, or of a diffusers pipeline with both; for image-to-video
    students with an image embedder."""
