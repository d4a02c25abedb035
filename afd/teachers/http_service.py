"""What the requests of one http source share: patience, rate, the run's end, and calls that cost nothing."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afd.teachers.http_journal import Journal
from afd.teachers.http_spec import CallSpec, HttpSpec, fill, fill_url, find
from afd.teachers.http_transport import Answer, Key, LostError, NotSentError, RefusedError, Transport

_MAX_JSON_BYTES = 8 << 20
_MAX_TEXT = 300


class RejectedError(Exception):
    """This request gives no video now (`is_final`: nor ever)."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class UnusableError(Exception):
    """The service refuses every request: a wrong key, no credit, a wrong address."""


class StoppedError(Exception):
    """The run is ending; the journal says how far the request is."""


@dataclass(frozen=True)
class Patience:
    """How often and how long to try again.

    Args:
        retries: attempts after the first.
        backoff_s, max_backoff_s: first and longest pause; the n-th is drawn from (1/2, 1] of backoff_s 2^n.
    """

    retries: int
    backoff_s: float
    max_backoff_s: float

    def pause_s(self, attempt: int, answer: Answer | None) -> float:
        """The pause before attempt + 1; Retry-After, where given, is the least."""
        pause = min(self.max_backoff_s, self.backoff_s * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)
        return max(pause, (answer.retry_after_s if answer else None) or 0.0)


class RateLimit:
    """Spaces submits evenly over all threads."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def reserve_s(self) -> float:
        """Take the next slot; return how long until it begins, s."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._gap_s
            return begin - now


@dataclass(frozen=True)
class Service:
    """Everything the requests of one source share."""

    spec: HttpSpec
    transport: Transport
    journal: Journal
    patience: Patience
    rate: RateLimit
    stop: threading.Event
    key: Key | None
    folder: Path
    max_bytes: int
    may_resubmit: bool
    check: Callable[[Path], None]
    problems: list[str] = field(default_factory=list)  # why `stop` was set, if it was not the caller's end

    def sleep(self, seconds: float) -> None:
        """Wait, unless the run ends."""
        if self.stop.wait(seconds):
            raise StoppedError

    def clean(self, text: object) -> str:
        """Somebody else's text, short, in one line, without the key."""
        line = " ".join(str(text).split())
        return (self.key.redact(line) if self.key else line)[:_MAX_TEXT]

    def call(self, call: CallSpec, values: Mapping[str, Any], headers: Mapping[str, str]) -> Answer:
        """Fill a call's templates and make it; raises what the transport raises."""
        given = {name: str(value) for name, value in fill({**self.spec.headers, **call.headers}, values).items()}
        body = None
        if call.body is not None:
            body = json.dumps(fill(call.body, values)).encode()
            given = {"Content-Type": "application/json", **given}
        url = fill_url(call.url, values)
        return self.transport.call(
            call.method, url, headers={**given, **headers}, body=body, max_bytes=self._answer_bytes()
        )

    def repeat(self, call: CallSpec, values: Mapping[str, Any], label: str, *, allowed: tuple[int, ...] = ()) -> Answer:
        """A call that costs nothing, until it gives 2xx with JSON (or an allowed status).

        Raises:
            RejectedError: the retries are used up. UnusableError: the key is refused.
        """
        last = ""
        for attempt in range(self.patience.retries + 1):
            answer = None
            try:
                answer = self.call(call, values, {})
                if answer.status in allowed:
                    return answer
                if answer.status // 100 == 2:
                    read_json(answer)
                    return answer
                last = f"HTTP {answer.status} {self.message(answer)}".strip()
                if answer.status in (401, 402, 403):
                    raise UnusableError(f"{label} refused: {last}")
            except (LostError, NotSentError, ValueError) as error:
                last = self.clean(error)
            except RefusedError as error:
                raise RejectedError(f"{label}: {self.clean(error)}", is_final=False) from error
            if attempt < self.patience.retries:
                self.sleep(self.patience.pause_s(attempt, answer))
        raise RejectedError(f"{label}: {last}", is_final=False)

    def _answer_bytes(self) -> int:
        """Most bytes of an answer: JSON, unless the video itself comes in it."""
        return _MAX_JSON_BYTES + (self.max_bytes * 4 // 3 if self.spec.result.kind != "url" else 0)

    def message(self, answer: Answer) -> str:
        """The service's own words about a failure."""
        paths = [call.error for call in (self.spec.submit, self.spec.poll) if call and call.error]
        try:
            tree = read_json(answer)
        except ValueError:
            return self.clean(answer.body[: 1 << 16].decode("utf-8", "replace"))
        return self.clean(next((text for path in paths if (text := find(tree, path))), ""))


def read_json(answer: Answer) -> Any:
    """The JSON of an answer.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise ValueError("answer is malformed JSON") from error
