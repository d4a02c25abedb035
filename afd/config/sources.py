"""Where finished videos come from when it is not the built-in world: a folder, a paid service, a local pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from afd.config.section import Fraction, NonNegative, Positive, Section

Seconds = Annotated[float, Field(ge=0)]


class FolderSection(Section):
    """Videos somebody already made."""

    path: Path | None = None
    """The folder; mp4, webm, gif, mov, mkv, avi or folders of numbered frames."""
    metadata: Path | None = None
    """The table of captions; default metadata.jsonl, .csv, .parquet, videos2caption.json, prompts.txt with videos.txt,
    or the folder's only prompt list."""
    video_column: str | None = None
    """Column of the file's name; default one of the usual names."""
    caption_column: str | None = None
    """Column of the caption; default one of the usual names."""
    frames_fps: Annotated[float, Field(gt=0)] = 24.0
    """Frames per second of folders of frames whose row has no `fps`."""
    version: str = ""
    """What you call this set of videos; goes into every row."""


class HttpSection(Section):
    """A generation service: submit, poll, download."""

    spec: Path | None = None
    """YAML that describes the service, like configs/teachers/*.yaml."""
    work_dir: Path | None = None
    """Where the journal of paid requests and the videos are kept; default `<output_dir>/teacher`. Never delete it
    while requests are open: they are paid for."""
    concurrency: Positive = 4
    """Requests open at a time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Submits per minute; None leaves it to `concurrency`."""
    max_calls: NonNegative | None = None
    """Submits that may ever be charged, over all runs of this work_dir; None is no limit."""
    max_cost: Annotated[float, Field(ge=0)] | None = None
    """The same in money, in the unit of the spec's `cost_per_call`; None is no limit."""
    on_unknown: Literal["hold", "resubmit"] = "hold"
    """A submit whose fate is unknown (killed or cut off before the answer), where the service has neither idempotency
    keys nor a look-up: `hold` rejects it and counts its cost, `resubmit` may pay twice."""
    retries: NonNegative = 6
    """Attempts after the first of a poll, a download, or a submit that was refused for now."""
    backoff_s: Annotated[float, Field(gt=0)] = 1.0
    """First pause before a retry; doubles each time, with jitter."""
    max_backoff_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest pause between retries, Retry-After excepted."""
    max_video_mib: Positive = 512
    """A download beyond it is refused."""


class PipelineSection(Section):
    """Any diffusers text-to-video pipeline saved in a folder."""

    path: Path | None = None
    """Folder with model_index.json."""
    work_dir: Path | None = None
    """Where its videos are kept until they are prepared; default `<output_dir>/teacher`."""
    devices: tuple[str, ...] = ()
    """One worker process each, e.g. [cuda:0, cuda:1]; default every visible GPU, or one CPU worker."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the pipeline's weights."""
    vae_float32: bool = True
    """Keep the VAE in float32, as Wan's authors advise."""
    num_frames: Positive = 81
    """Frames of a clip."""
    height: Positive = 480
    """Pixels."""
    width: Positive = 832
    """Pixels."""
    fps: Positive = 16
    """Frames per second the clip is meant to be shown at."""
    num_inference_steps: Positive = 50
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance."""
    negative_prompt: str = ""
    """What to steer away from."""
    extra: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Further arguments of the pipeline's call, e.g. {flow_shift: 5.0} where it has one."""
    offload: Literal["none", "model", "sequential"] = "none"
    """diffusers' CPU offload, for GPUs that the pipeline does not fit."""
    crf: NonNegative = 12
    """H.264 constant rate factor of the kept videos."""


class LiveSection(Section):
    """Asking the teacher during training for prompts that are not in the shards."""

    enabled: bool = False
    """Start a process beside rank 0 that fetches, decodes, encodes and writes small shards."""
    cache: Path | None = None
    """Folder of these shards, seen by every rank; default `<output_dir>/data/live`."""
    samples_per_part: Positive = 16
    """Videos in one part; what is smaller waits, unless the source has ended."""
    check_every: Positive = 10
    """Steps between looks for new parts; all ranks take up the same ones."""
    max_wait_s: Seconds = 0.0
    """Longest time a step may wait for the first part, s, while there is none; 0 never waits."""
    share: Fraction | None = None
    """Part of the samples that come from the live shards; default in proportion to their number."""
    max_videos: Positive | None = None
    """Videos to ask for at most, those in the cache included; None takes all the source has."""
    device: str = "cpu"
    """Where that process encodes; a GPU is shared with the step."""
