"""The requests of a source, numbered: which split each belongs to, which are refused as duplicates, which are done.

Numbers follow the source's own order, so they, the splits and the refusals are the same in every run of the same
source. What was seen is kept in a temporary SQLite database on the disk: memory does not grow with the videos.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from afd.data.schema import Reject, Sample
from afd.seen import Seen
from afd.teachers.base import SourceReject, SourceVideo, VideoRequest, VideoSource

SPLITS = ("train", "heldout")
SplitRule = Callable[[VideoRequest], str]


def prompt_key(request: VideoRequest | SourceVideo | Sample) -> bytes:
    """What makes two prompts the same: their words, whatever the case and the blanks; of an extended prompt, the
    original's.
    """
    text = " ".join((request.short_prompt or request.prompt).casefold().split())
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Census:
    """What a source would give, found out without making a video: a pass that wants nothing.

    Attributes:
        num_requests: requests.
        digest: sha256 over every request, in order: another digest means other shards.
        lowest, highest: the lowest and the highest prompt key; empty without requests.
        num_rejects: what is no request: no caption, no such file, a broken line.
        rejects: the first three of them.
    """

    num_requests: int
    digest: str
    lowest: bytes
    highest: bytes
    num_rejects: int
    rejects: tuple[Reject, ...]

    @property
    def num_prompts(self) -> int:
        """0, 1 or 2, counted no further."""
        return (self.lowest != b"") + (self.lowest != self.highest)


def take_census(source: VideoSource) -> Census:
    """Ask a source for its requests and refuse them all."""
    digest, count, low, high = hashlib.sha256(), 0, b"", b""

    def refuse(request: VideoRequest) -> bool:
        nonlocal count, low, high
        count += 1
        text = "\0".join((request.source_id, str(request.seed), request.prompt, request.short_prompt))
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        key = prompt_key(request)
        low, high = min(low or key, key), max(high or key, key)
        return False

    num_rejects, rejects = 0, []
    for given in source.videos(refuse):
        num_rejects += 1
        if isinstance(given, SourceReject) and num_rejects <= 3:
            rejects.append(Reject(given.source_id, given.reason))
    return Census(count, digest.hexdigest(), low, high, num_rejects, tuple(rejects))


def hash_split(heldout_fraction: float, census: Census) -> SplitRule:
    """Hold out the prompts whose hash falls below the fraction: always the lowest one, never the highest of several."""
    limit = int(heldout_fraction * 2**64)

    def split_of(request: VideoRequest) -> str:
        key = prompt_key(request)
        is_below = int.from_bytes(key[:8], "big") < limit and key != census.highest
        return "heldout" if is_below or key == census.lowest else "train"

    return split_of


@dataclass(frozen=True)
class Item:
    """What a source yielded: the number of its request (None for a reject without one), and the video or reject."""

    number: int | None
    split: str
    given: SourceVideo | SourceReject

    @property
    def video(self) -> SourceVideo | None:
        """The video, if it is one."""
        return self.given if isinstance(self.given, SourceVideo) else None

    def reject(self, reason: str = "") -> Reject:
        """The reject of this item: for a reason of ours, which is final, or for the source's."""
        if isinstance(self.given, SourceReject) and not reason:
            return Reject(self.given.source_id, self.given.reason, self.file, self.given.is_final)
        return Reject(self.given.source_id, reason, self.file)

    @property
    def file(self) -> str:
        """Where the video lies, if it is a file."""
        path = self.video.path if self.video else None
        return "" if path is None else str(path).encode("utf-8", "backslashreplace").decode()


class Intake:
    """A source's items with their numbers, from the first unfinished one.

    Args:
        source: asked in its own order.
        split_of: names each request's split.
        start: number of the first request that is not done.
        videos_per_prompt: requests taken per prompt; None takes all.
        is_settled: tells by source_id what an earlier pass has settled; such a request is counted and not made.
    """

    def __init__(
        self,
        source: VideoSource,
        split_of: SplitRule,
        *,
        start: int,
        videos_per_prompt: int | None = None,
        is_settled: Callable[[str], bool] = lambda source_id: False,
    ) -> None:
        self._source, self._split_of, self._start, self._limit = source, split_of, start, videos_per_prompt
        self._is_settled = is_settled
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[int, str]] = {}  # in flight: source_id -> number, split
        self._refused: dict[int, Reject] = {}
        self._next = 0
        self._prompts = Seen()

    def items(self) -> Iterator[Item]:
        """Everything the source yields for requests from `start` on, and all unsettled rejects without a request.

        Raises:
            ValueError: the source yields a video it never asked about, or asks twice for one source_id.
        """
        for given in self._source.videos(self._is_wanted):
            with self._lock:
                number, split = self._asked.pop(given.source_id, (None, ""))
            if number is None and isinstance(given, SourceVideo):
                raise ValueError(f"source {self._source.teacher} gave {given.source_id!r}, which was not asked for")
            if number is not None or not self._is_settled(given.source_id):
                yield Item(number, split, given)

    def refused_below(self, number: int) -> list[tuple[int, Reject]]:
        """Take the duplicates among the requests before `number`, in order."""
        with self._lock:
            taken = sorted(n for n in self._refused if n < number)
            return [(n, self._refused.pop(n)) for n in taken]

    @property
    def num_asked(self) -> int:
        """Requests asked about so far."""
        return self._next

    def _is_wanted(self, request: VideoRequest) -> bool:
        over = self._limit is not None and self._prompts.count(prompt_key(request)) >= self._limit
        with self._lock:
            number, self._next = self._next, self._next + 1
            if number < self._start or self._is_settled(request.source_id):
                return False
            if over:
                reason = f"the prompt already has {self._limit} (prepare.videos_per_prompt)"
                self._refused[number] = Reject(request.source_id, reason)
                return False
            if request.source_id in self._asked:
                raise ValueError(f"source_id must be unique, got {request.source_id!r} twice")
            self._asked[request.source_id] = (number, self._split_of(request))
            return True
