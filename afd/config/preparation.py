"""How finished videos become shards (`afd prepare`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from afd.config.section import NonNegative, Positive, Section


class PrepareSection(Section):
    """What `afd prepare` keeps, refuses and how it works; sizes and rates are `video`'s, networks `encoders`'."""

    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the prompts that is held out, chosen by a hash of the prompt (at least one prompt and never all); physics
    has its own split."""
    videos_per_prompt: Positive | None = None
    """Requests taken per prompt (spelling, case and blanks aside), the first ones; None takes all."""
    dedupe_videos: Literal["any", "prompt", "off"] = "any"
    """Reject a file whose bytes came before: under `any` prompt, under the same `prompt`, or never."""
    keep_video: Literal["none", "source", "resampled", "codec"] = "none"
    """Video in each row, for discriminators that see pixels: the `source` file, the frames at the student's size and
    rate (`resampled`), or these through the codec as the student's own clips go (`codec`), both as H.264."""
    crf: Annotated[int, Field(ge=0, le=51)] = 18
    """H.264 quality of `resampled` and `codec`; lower is better."""
    batch_size: Positive = 8
    """Clips encoded at once; part of the shards' settings, because it decides the last bits of the latents."""
    shard_mib: Annotated[float, Field(gt=0, le=4000)] = 32.0
    """Uncompressed size of a shard."""
    workers: NonNegative | None = None
    """Processes that decode; 0 decodes in the main process. None is 0 for physics, else the cores minus one."""
    video_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time for decoding one video; a video that takes longer is rejected."""
    max_video_mib: Annotated[float, Field(gt=0)] = 1024.0
    """Largest file that is read."""
    device: str | None = None
    """Where the codec and the text encoder run; None takes a GPU if there is one."""
