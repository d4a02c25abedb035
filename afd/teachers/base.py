"""The black-box contract of a teacher: prompts and seeds in, finished videos out.

`Teacher` answers one (prompt, seed); `VideoSource` is what preparation reads: every finished video of a teacher, in a
fixed order, each as a file or bytes, or as a reject with its reason.
Leaves out everything a closed video service does not give: scores, latents, trajectories, sampling steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from afd.teachers.frames import encode_frame_folder


@dataclass(frozen=True)
class FinishedVideo:
    """One finished teacher video.

    Args:
        prompt: the text the teacher was asked for.
        seed: the integer that makes this video reproducible for the same prompt.
        mp4: the encoded file, container included.
        source_id: a name unique to (teacher, its settings, prompt, seed).
    """

    prompt: str
    seed: int
    mp4: bytes
    source_id: str


class Teacher(Protocol):
    """Anything that turns a prompt into a finished video."""

    def generate(self, prompt: str, seed: int) -> FinishedVideo:
        """Return the finished video of `prompt` drawn with `seed`; the same pair gives the same video."""
        ...


@dataclass(frozen=True)
class VideoRequest:
    """One video a source can give, named before it is made (and paid for).

    Args:
        prompt: the text asked for; the extended one where a prompt list has an `_extended` twin.
        seed: the integer that tells videos of one prompt apart; one drawn from the file's name where none is known.
        source_id: unique within the source and the same in every run.
        short_prompt: the original of an extended prompt, else empty.
    """

    prompt: str
    seed: int
    source_id: str
    short_prompt: str = ""

    def video(
        self,
        *,
        teacher: str,
        version: str,
        path: Path | None = None,
        data: bytes | None = None,
        fps: float | None = None,
        licence: str = "",
    ) -> SourceVideo:
        """The finished video of this request; the arguments are the fields of `SourceVideo`."""
        return SourceVideo(
            prompt=self.prompt,
            seed=self.seed,
            source_id=self.source_id,
            teacher=teacher,
            version=version,
            path=path,
            data=data,
            fps=fps,
            licence=licence,
            short_prompt=self.short_prompt,
        )


@dataclass(frozen=True)
class SourceVideo:
    """One finished video of a source: exactly one of `path` and `data`. Small and picklable when it is a path.

    Args:
        prompt, seed, source_id, short_prompt: as in `VideoRequest`.
        teacher: the teacher's name, e.g. `physics`, `folder`, `http:acme-video-2`, `pipeline:WanPipeline`.
        version: changes whenever the teacher's settings do (a fingerprint, or what the user calls it).
        path: a finished file (mp4, webm, gif, ...), or a folder of numbered frames.
        data: the finished file's bytes.
        fps: frames per second of a folder of frames; None for a file, which knows its own.
        licence: licence tag, e.g. `CC-BY-4.0`; empty when unknown.
    """

    prompt: str
    seed: int
    source_id: str
    teacher: str
    version: str
    path: Path | None = None
    data: bytes | None = None
    fps: float | None = None
    licence: str = ""
    short_prompt: str = ""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError(f"a SourceVideo needs exactly one of path and data, got {self.source_id!r}")

    def read(self, *, max_bytes: int = 1 << 30) -> bytes:
        """Return the video as the bytes of one container; a folder of frames is packed without loss.

        Raises:
            ValueError: missing, empty, no regular file, larger than max_bytes, or frames that cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        if self.path.is_dir():
            return encode_frame_folder(self.path, fps=self.fps or 24.0, max_bytes=max_bytes)
        try:
            size = self.path.stat().st_size
            if not self.path.is_file() or not 0 < size <= max_bytes:
                raise ValueError(f"{self.source_id}: must be a file of 1 to {max_bytes} bytes, got {size}")
            return self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.source_id}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class SourceReject:
    """Something a source offered that is no video, and why.

    Args:
        source_id: the request's, or the place in the source (`metadata.jsonl:17`, a file) where there is no request.
        reason: one line, without secrets.
        is_final: False where the next run may get it after all (a budget used up, a service that is down).
    """

    source_id: str
    reason: str
    is_final: bool = True


def accept_all(request: VideoRequest) -> bool:
    """The `wanted` of a caller who wants every video."""
    del request
    return True


class VideoSource(Protocol):
    """Every finished video of one teacher; what `afd prepare` reads."""

    @property
    def teacher(self) -> str:
        """The teacher's name; the same in every SourceVideo."""
        ...

    @property
    def version(self) -> str:
        """Fingerprint of the teacher's settings; the same in every SourceVideo."""
        ...

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Iterator[SourceVideo | SourceReject]:
        """Yield one video or reject for each wanted request, in an order that is the same in every run.

        A request that `wanted` refuses costs nothing: no call, no decoding. `wanted` is asked once per request, in
        order, possibly from another thread and well before that request's video is yielded. One bad entry never
        ends the iteration.

        Raises:
            ValueError: the source as a whole cannot be used (no such folder, no caption file, no budget left).
        """
        ...


def request_id(teacher: str, version: str, prompt: str, seed: int) -> str:
    """A source_id that is the same in every run: sha256 of what decides the video, 16 hex digits."""
    digest = hashlib.sha256("\n".join((teacher, version, str(seed), prompt)).encode("utf-8", "surrogatepass"))
    return f"{teacher.replace('/', '-').replace(':', '-')}-{digest.hexdigest()[:16]}"
