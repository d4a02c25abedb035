"""The http teacher: a paid, asynchronous generation service as a source of finished videos, many requests at a time.

Owns what the requests share and the budget's end; one request is http_job.py's.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from afd.teachers.base import FinishedVideo, SourceReject, SourceVideo, VideoRequest, accept_all, request_id
from afd.teachers.http_job import Job
from afd.teachers.http_journal import BudgetUsedUpError, Journal
from afd.teachers.http_service import Patience, RateLimit, RejectedError, Service, StoppedError, UnusableError
from afd.teachers.http_spec import HttpSpec
from afd.teachers.http_transport import Key, Transport
from afd.teachers.ordered import obtain_in_order

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HttpLimits:
    """What a source may do; the fields are those of `teacher.http`."""

    concurrency: int = 4
    requests_per_minute: float | None = None
    max_calls: int | None = None
    max_cost: float | None = None
    may_resubmit: bool = False
    retries: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    max_bytes: int = 512 << 20


class HttpSource:
    """Every (prompt, seed) of a list, asked of a service described by `spec`; asked for once, ever.

    Args:
        spec: the service.
        requests: gives the requests in order, anew at each call; rejects among them are passed on.
        work_dir: journal.jsonl and videos/; one process at a time.
        limits: concurrency, budget and patience.
        environment: where the key is looked up.
        licence: tag of every video.
    Raises:
        ValueError: the key's variable is not set, or a money limit has no price to go with it.
    """

    def __init__(
        self,
        spec: HttpSpec,
        requests: Callable[[], Iterable[VideoRequest | SourceReject]],
        *,
        work_dir: Path,
        limits: HttpLimits | None = None,
        environment: Mapping[str, str] = os.environ,
        licence: str = "",
    ) -> None:
        self._spec, self._requests, self._work_dir = spec, requests, work_dir
        self._limits, self._licence = limits or HttpLimits(), licence
        self.teacher, self.version = f"http:{spec.name}", spec.version
        if self._limits.max_cost is not None and spec.cost_per_call is None:
            raise ValueError("teacher.http.max_cost needs cost_per_call in the spec, got none")
        self._key = None
        if spec.auth is not None:
            secret = environment.get(spec.auth.env, "")
            if not secret:
                raise ValueError(f"environment variable {spec.auth.env} must hold the key of {spec.name}, it is empty")
            try:
                self._key = Key(spec.auth.header, spec.auth.value, secret)
            except ValueError as error:
                raise ValueError(f"environment variable {spec.auth.env}: {error}") from None

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Generator[SourceVideo | SourceReject]:
        """Yield the wanted videos in the order of the requests, `concurrency` of them open at a time.

        Once the budget is used up, requests already paid for are still fetched; the others are counted in one last
        reject. Ending the iteration early leaves open requests to the next run.

        Raises:
            ValueError: another process holds work_dir, or the service refuses the key or the address.
        """
        service = self._open()
        obtain = functools.partial(self._obtain, service)
        outcomes = obtain_in_order(
            self._requests(), wanted, obtain, num_threads=self._limits.concurrency, stop=service.stop.set
        )
        num_skipped = 0
        try:
            for outcome in outcomes:
                num_skipped += outcome is None
                if outcome is not None:
                    yield outcome
            if num_skipped:
                reason = f"budget: {num_skipped} requests not made after {self._spent(service.journal)}"
                yield SourceReject(f"{self.teacher}-budget", reason, is_final=False)
        except StoppedError:
            raise ValueError(service.problems[0]) from None
        finally:
            outcomes.close()
            logger.info("%s: %s so far", self.teacher, self._spent(service.journal))
            service.journal.close()

    def generate(self, prompt: str, seed: int) -> FinishedVideo:
        """Return one video; blocks until it is there.

        Raises:
            ValueError: the service gives none; names the reason.
        """
        request = VideoRequest(prompt, seed, request_id(self.teacher, self.version, prompt, seed))
        service = self._open()
        try:
            outcome = self._obtain(service, request)
        except StoppedError:
            raise ValueError(service.problems[0]) from None
        finally:
            service.journal.close()
        if not isinstance(outcome, SourceVideo):
            raise ValueError(f"{self.teacher}: {outcome.reason if outcome else 'the budget is used up'}")
        return FinishedVideo(prompt, seed, outcome.read(max_bytes=self._limits.max_bytes), request.source_id)

    def _open(self) -> Service:
        """Take the work folder and make what the requests share."""
        limits, spec = self._limits, self._spec
        journal = Journal(
            self._work_dir,
            max_calls=limits.max_calls,
            max_cost=limits.max_cost,
            cost_per_call=spec.cost_per_call or 0.0,
        )
        folder = self._work_dir / "videos"
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.mp4.*"):  # half-written by a killed run; the journal's lock is ours
            leftover.unlink()
        return Service(
            spec=spec,
            transport=Transport(
                key=self._key,
                origins=spec.origins,
                timeout_s=spec.timeout_s,
                limit_s=spec.call_limit_s,
            ),
            journal=journal,
            patience=Patience(limits.retries, limits.backoff_s, limits.max_backoff_s),
            rate=RateLimit(limits.requests_per_minute),
            stop=threading.Event(),
            key=self._key,
            folder=folder,
            max_bytes=limits.max_bytes,
            may_resubmit=limits.may_resubmit,
            check=check_video,
        )

    def _obtain(self, service: Service, request: VideoRequest) -> SourceVideo | SourceReject | None:
        """One request's outcome; None when the budget does not allow it."""
        if service.stop.is_set():
            raise StoppedError
        try:
            path = Job(service, request).run()
        except BudgetUsedUpError:
            return None
        except RejectedError as error:
            return SourceReject(request.source_id, f"{error} ({request.prompt[:60]!r})", is_final=error.is_final)
        except UnusableError as error:
            raise self._stop(service, f"{self.teacher}: {error}") from error
        except OSError as error:
            raise self._stop(service, f"{self._work_dir} cannot be written: {error.strerror}") from error
        return request.video(teacher=self.teacher, version=self.version, path=path, licence=self._licence)

    def _stop(self, service: Service, problem: str) -> StoppedError:
        """End the run for all threads."""
        service.problems.append(problem)
        service.stop.set()
        return StoppedError()

    def _spent(self, journal: Journal) -> str:
        price = f", {journal.cost:g} in money" if self._spec.cost_per_call is not None else ""
        return f"{journal.num_charged} calls{price}"


def check_video(path: Path) -> None:
    """Refuse what is no whole video: an error page, or a file cut off in its middle. Reads packets, decodes nothing.

    Raises:
        ValueError: no video stream, no packet, or the container ends early.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path), mode="r") as container:
            if not container.streams.video:
                raise ValueError("the file has no video stream")
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            if not packets or any(packet.is_corrupt for packet in packets):
                raise ValueError("the file is cut off or damaged")
            if stream.frames and len(packets) < stream.frames:
                raise ValueError(f"the file is cut off: {len(packets)} of {stream.frames} frames")
    except (FFmpegError, OSError) as error:
        raise ValueError(f"the file is no video ({type(error).__name__})") from error
