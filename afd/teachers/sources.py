"""Configuration to the source it asks for. Knows the sections; each teacher sees plain values."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from afd.config import RunConfig
from afd.teachers.base import SourceReject, SourceVideo, Teacher, VideoRequest, VideoSource, accept_all
from afd.teachers.folder import FolderSource
from afd.teachers.folder_metadata import Columns
from afd.teachers.http import HttpLimits, HttpSource
from afd.teachers.http_spec import load_spec
from afd.teachers.pipeline import PipelineCall, PipelineSource, default_devices
from afd.teachers.prompts import read_prompts, requests_of


def open_source(config: RunConfig) -> VideoSource:
    """The source of `teacher.kind`; physics has none: its prompts are made, not listed (see `GeneratedSource`).

    Raises:
        ValueError: a field the kind needs is missing, or what it names cannot be used.
    """
    teacher = config.teacher
    if teacher.kind == "folder":
        folder = teacher.folder
        return FolderSource(
            _required(folder.path, "teacher.folder.path"),
            table=folder.metadata,
            columns=Columns(folder.video_column, folder.caption_column),
            frames_fps=folder.frames_fps,
            version=folder.version,
            licence=teacher.licence,
        )
    if teacher.kind == "http":
        return _open_http(config)
    if teacher.kind == "pipeline":
        return _open_pipeline(config)
    raise ValueError(f"teacher.kind must be folder, http or pipeline to read videos, got {teacher.kind!r}")


def default_work_dir(config: RunConfig) -> Path:
    """Where a teacher keeps its journal and videos unless its section says."""
    return config.output_dir / "teacher"


def _open_http(config: RunConfig) -> HttpSource:
    teacher, http = config.teacher, config.teacher.http
    spec = load_spec(_required(http.spec, "teacher.http.spec"))
    limits = HttpLimits(
        concurrency=http.concurrency,
        requests_per_minute=http.requests_per_minute,
        max_calls=http.max_calls,
        max_cost=http.max_cost,
        may_resubmit=http.on_unknown == "resubmit",
        retries=http.retries,
        backoff_s=http.backoff_s,
        max_backoff_s=http.max_backoff_s,
        max_bytes=http.max_video_mib << 20,
    )
    requests = functools.partial(_requests(config), f"http:{spec.name}", spec.version)
    work_dir = http.work_dir or default_work_dir(config)
    return HttpSource(spec, requests, work_dir=work_dir, limits=limits, licence=teacher.licence)


def _open_pipeline(config: RunConfig) -> PipelineSource:
    teacher, section = config.teacher, config.teacher.pipeline
    options = section.model_dump(exclude={"path", "work_dir", "devices"})
    return PipelineSource(
        _required(section.path, "teacher.pipeline.path"),
        _requests(config),
        work_dir=section.work_dir or default_work_dir(config),
        call=PipelineCall(**options),
        devices=section.devices or default_devices(),
        licence=teacher.licence,
    )


def _requests(config: RunConfig) -> Callable[[str, str], Iterator[VideoRequest | SourceReject]]:
    """What to ask the teacher of this name and version, from the list of prompts."""
    teacher = config.teacher
    prompts = read_prompts(_required(teacher.prompts, "teacher.prompts"))

    def requests(name: str, version: str) -> Iterator[VideoRequest | SourceReject]:
        counts = {"videos_per_prompt": teacher.videos_per_prompt, "first_seed": teacher.first_seed}
        return requests_of(prompts, teacher=name, version=version, **counts)

    return requests


def _required(path: Path | None, name: str) -> Path:
    if path is None:
        raise ValueError(f"{name} must be set for this teacher.kind")
    return path


class GeneratedSource:
    """A source of a teacher that answers at once and in memory: the built-in world.

    Args:
        generator: the teacher; several threads ask it at a time.
        requests: what to ask it, in order.
        teacher, version: as in `SourceVideo`.
    """

    def __init__(self, generator: Teacher, requests: Sequence[VideoRequest], *, teacher: str, version: str) -> None:
        self._generator, self._requests = generator, requests
        self.teacher, self.version = teacher, version

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Iterator[SourceVideo | SourceReject]:
        """The wanted requests' videos in order, a few made ahead of their turn."""
        num_threads = len(os.sched_getaffinity(0))
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="teacher")
        pending: deque[Future[SourceVideo]] = deque()
        try:
            for request in filter(wanted, self._requests):
                pending.append(pool.submit(self._make, request))
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _make(self, request: VideoRequest) -> SourceVideo:
        finished = self._generator.generate(request.prompt, request.seed)
        return request.video(teacher=self.teacher, version=self.version, data=finished.mp4)
