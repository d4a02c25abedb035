"""Decoding processes that may hang or die: the video they were at is rejected, another process takes over.

Each thread of a small pool owns one process (worker.py) and waits for its answers; results come in the order of the
jobs, and no more than a few jobs are in memory at once.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import afd
from afd.preparation.decoding import Clip, ClipFormat, decode_clip
from afd.teachers.base import SourceVideo

Job = TypeVar("Job")
_CHUNK = 1 << 20
# Decoded clips that may wait for the encoder: an 81-frame clip of 480 x 832 takes 388 MB.
_WAITING_BYTES = 4 << 30

logger = logging.getLogger(__name__)


class DecoderPool:
    """Decodes videos in `num_workers` processes; 0 decodes in this one, without protection.

    Args:
        wanted: the frames to return.
        num_workers: processes.
        timeout_s: longest time for one video.
    """

    def __init__(self, wanted: ClipFormat, *, num_workers: int, timeout_s: float) -> None:
        self._wanted, self._num_workers, self._timeout_s = wanted, num_workers, timeout_s
        clip_bytes = wanted.num_frames * wanted.height * wanted.width * 3 * 4
        self._ahead = max(1, min(2 * num_workers, _WAITING_BYTES // clip_bytes))
        self._own = threading.local()
        self._processes: list[_Process] = []

    def map(self, jobs: Iterable[Job], video_of: Callable[[Job], SourceVideo | None]) -> Iterator[tuple[Job, Any]]:
        """Yield (job, `Clip` or reason) in the order of the jobs; (job, None) where `video_of` gives no video."""
        if self._num_workers == 0:
            for job in jobs:
                video = video_of(job)
                yield job, None if video is None else decode_clip(video, self._wanted)
            return
        threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        pending: deque[tuple[Job, Future[Clip | str] | None]] = deque()
        try:
            for job in jobs:
                video = video_of(job)
                pending.append((job, None if video is None else threads.submit(self._decode, video)))
                while len(pending) > self._ahead or (pending and pending[0][1] is None):
                    yield _resolve(pending.popleft())
            while pending:
                yield _resolve(pending.popleft())
        finally:
            for process in self._processes:
                process.kill()
            threads.shutdown(wait=True, cancel_futures=True)

    def _decode(self, video: SourceVideo) -> Clip | str:
        process = getattr(self._own, "process", None)
        if process is None or not process.is_alive:
            process = self._own.process = _Process()
            self._processes = [other for other in self._processes if other.is_alive] + [process]
        try:
            return process.ask((video, self._wanted), self._timeout_s)
        except TimeoutError:
            process.kill()
            return f"decoding took longer than {self._timeout_s:g} s"
        except (EOFError, BrokenPipeError):
            status = process.kill(after_s=5.0)
            return f"the decoder died ({'signal' if status < 0 else 'exit status'} {abs(status)})"


def _resolve(item: tuple[Job, Future[Clip | str] | None]) -> tuple[Job, Any]:
    return item[0], None if item[1] is None else item[1].result()


class _Process:
    """One worker.py and the pipes to it."""

    def __init__(self) -> None:
        root = str(Path(afd.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "afd.preparation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: object, timeout_s: float) -> Any:
        """Send a job and read its answer.

        Raises:
            TimeoutError: no whole answer in time.
            EOFError, BrokenPipeError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        pickle.dump(job, self._process.stdin, protocol=5)
        self._process.stdin.flush()
        return pickle.load(_Reader(self._process.stdout.fileno(), deadline))

    def kill(self, *, after_s: float = 0.0) -> int:
        """End the process, after waiting for it to end by itself, and return its status."""
        try:
            self._process.wait(after_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was not sent is lost on purpose
                    logger.debug("a job was not sent to its decoder")
        return status


class _Reader:
    """Exactly as many bytes of a pipe as pickle asks for, until a deadline."""

    def __init__(self, descriptor: int, deadline: float) -> None:
        self._descriptor, self._deadline, self._buffer = descriptor, deadline, b""

    def _fill(self) -> None:
        wait = self._deadline - time.monotonic()
        if wait <= 0 or not select.select([self._descriptor], [], [], wait)[0]:
            raise TimeoutError
        chunk = os.read(self._descriptor, _CHUNK)
        if not chunk:
            raise EOFError
        self._buffer += chunk

    def read(self, count: int) -> bytes:
        parts, missing = [], count
        while missing:
            if not self._buffer:
                self._fill()
            part, self._buffer = self._buffer[:missing], self._buffer[missing:]
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def readline(self) -> bytes:
        while b"\n" not in self._buffer:
            self._fill()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"
