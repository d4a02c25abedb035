"""What the thread that generates and the threads of the viewers share: the prompt, and the events to show."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

_HEARTBEAT_S = 2.0  # how soon a viewer that went away is noticed
_KEPT_EVENTS = 16


class LivePrompt:
    """The prompt of a running stream; calling it gives its embeddings, any thread may change it.

    Attributes:
        in_use: words of the prompt last asked for, hence of the chunk being generated.
    """

    def __init__(self, encode: Callable[[str], Tensor], prompt: str) -> None:
        """Embed the first prompt with `encode`: words to [1, L, D], ValueError for words it cannot embed."""
        self._encode = encode
        self._lock = threading.Lock()
        self._current = prompt, encode(prompt)
        self.in_use = prompt

    def __call__(self) -> Tensor:
        """[1, L, D]: the same tensor until the prompt changes."""
        self.in_use, embeds = self._current
        return embeds

    def change(self, prompt: str) -> None:
        """Embed another prompt; the next chunk is generated with it.

        Raises:
            ValueError: it cannot be embedded; the prompt stays as it is.
        """
        with self._lock:
            self._current = prompt, self._encode(prompt)


class Broadcast:
    """Server-sent events for any number of viewers, each at its own speed; slow ones miss the oldest."""

    def __init__(self) -> None:
        """Start without events and viewers."""
        self._changed = threading.Condition()
        self._events: deque[bytes] = deque(maxlen=_KEPT_EVENTS)
        self._num_events = 0
        self._num_viewers = 0
        self._is_over = False

    def publish(self, kind: str, payload: dict[str, Any]) -> None:
        """Send one event to whoever is there."""
        event = f"event: {kind}\ndata: {json.dumps(payload)}\n\n".encode()
        with self._changed:
            self._events.append(event)
            self._num_events += 1
            self._changed.notify_all()

    def end(self) -> None:
        """No event will follow: `follow` returns once it has given the last one."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def follow(self) -> Generator[bytes]:
        """Events from the newest on, as they come, and comments when nothing does; a viewer while it is iterated."""
        with self._changed:
            self._num_viewers += 1
            position = max(0, self._num_events - 1)
            self._changed.notify_all()
        try:
            while True:
                with self._changed:
                    if position >= self._num_events and not self._is_over:
                        self._changed.wait(_HEARTBEAT_S)
                    position = max(position, self._num_events - len(self._events))
                    new = list(self._events)[len(self._events) - (self._num_events - position) :]
                    position, is_over = self._num_events, self._is_over
                yield b"".join(new) or b": still here\n\n"
                if is_over:
                    return
        finally:
            with self._changed:
                self._num_viewers -= 1
                self._changed.notify_all()

    def wait_for_viewers(self, present: bool, timeout_s: float | None = None) -> bool:
        """Block until somebody watches (or nobody does); whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: (self._num_viewers > 0) == present or self._is_over, timeout_s)


class Pace:
    """Keeps generation at most `ahead_s` of video ahead of a viewer who started with the first frame.

    Further ahead, a change of the prompt would be seen only after what is already there has been shown.
    """

    def __init__(self, ahead_s: float) -> None:
        """Start with nothing handed over."""
        self.ahead_s = ahead_s
        self._shown_until = 0.0  # on the monotonic clock

    def wait_s(self, duration_s: float) -> float:
        """How long to wait after handing over `duration_s` of video, s."""
        now = time.monotonic()
        self._shown_until = max(self._shown_until, now) + duration_s
        return max(0.0, self._shown_until - now - self.ahead_s)
