"""Being asked to stop: SIGTERM (preemption, `kill`) and SIGUSR2 (Slurm's warning ahead of the time limit).

A handler only sets a flag. The trainer agrees on it over all ranks at a step boundary, commits, and the process ends
with STOPPED, which tells whoever started it to start it again. A thread that does not depend on the main one ends
the process with OVERDUE, after dumping every stack, when the grace time is over. Only the standard library is
imported here, so that signals are caught before the slow imports. SIGUSR1 is left to NCCL.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

STOPPED = 75
"""Exit code of a run that committed a step because it was asked to stop: run the same command again (EX_TEMPFAIL)."""
OVERDUE = 76
"""Exit code of a run that was asked to stop and did not reach a commit in time: the last commit stands; run again."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
MARKER = "stopped.json"


class StopRequest:
    """Whether this process was asked to stop; made by `catch_stop_signals`.

    Attributes:
        grace_s: from the first signal to the end of the process, s.
        output_dir: where the marker of an overdue process goes; None writes none.
    """

    def __init__(self, grace_s: float = 120.0) -> None:
        self.grace_s = grace_s
        self.output_dir: Path | None = None
        self.signal_name: str | None = None
        self.wakeup: socket.socket | None = None  # kept open for the C handlers
        self._is_over = threading.Event()

    @property
    def is_requested(self) -> bool:
        """True once a signal has come."""
        return self.signal_name is not None

    def remember(self, number: int) -> None:
        """Note the first signal; later ones change nothing."""
        self.signal_name = self.signal_name or signal.Signals(number).name

    def disarm(self) -> None:
        """The run is over: the grace time no longer counts."""
        self._is_over.set()

    def enforce(self, received: socket.socket) -> None:
        """Body of the watching thread: wait for a stop signal, then for the end of the grace time."""
        while not self.is_requested:
            for number in received.recv(64):  # the C handlers' bytes
                if number in STOP_SIGNALS:
                    self.remember(number)
        asked_at = time.monotonic()
        while (left := asked_at + self.grace_s - time.monotonic()) > 0:  # grace_s may still change
            if self._is_over.wait(min(left, 1.0)):
                return
        sys.stderr.write(f"{self.signal_name}: no commit within {self.grace_s:g} s, giving up; the stacks:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        if self.output_dir is not None:
            write_marker(self.output_dir, exit_code=OVERDUE, signal_name=str(self.signal_name), step=None)
        os._exit(OVERDUE)


_installed: StopRequest | None = None


def catch_stop_signals() -> StopRequest:
    """Catch SIGTERM and SIGUSR2 from now on; a second call returns the same object. For the main thread.

    Python runs a handler only between two bytecodes of the main thread, which may be inside a collective for half an
    hour; so the C handler's byte also wakes a thread, and the grace time runs from the signal.
    """
    global _installed  # noqa: PLW0603 - signal handlers belong to the process
    if _installed is not None:
        return _installed
    request = StopRequest()
    # Slurm signals a job's every process. Shared memory's book-keeper would die of a SIGUSR2 that is not ignored
    # when it starts; SIGTERM it ignores by itself.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    resource_tracker.ensure_running()
    received, sent = socket.socketpair()
    sent.setblocking(False)
    signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda caught, _frame: request.remember(caught))
    request.wakeup = sent
    threading.Thread(target=request.enforce, args=(received,), name="stop-grace", daemon=True).start()
    os.register_at_fork(after_in_child=ignore_stop_signals)
    _installed = request
    return request


def ignore_stop_signals() -> None:
    """What a data worker does: whoever uses its results decides when it ends. Forked children do it by themselves;
    for spawned ones it is the initializer."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def write_marker(output_dir: Path, *, exit_code: int, signal_name: str, step: int | None) -> None:
    """Leave stopped.json: torchrun turns every exit code of a rank into 1, so a batch script looks for this file."""
    body = {"exit_code": exit_code, "signal": signal_name, "step": step, "time_unix_s": round(time.time(), 3)}
    temporary = output_dir / f"{MARKER}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(body) + "\n")
    os.replace(temporary, output_dir / MARKER)


class Watchdog:
    """Dumps every thread's stack to stderr when nothing has moved for a while; kills nothing.

    A hang inside a collective ends by the process group's timeout; this says where it was.
    """

    def __init__(self, after_s: float) -> None:
        """after_s: 0 switches it off."""
        self.after_s = after_s

    def step(self) -> None:
        """Something moved: start counting anew."""
        if self.after_s:
            faulthandler.dump_traceback_later(self.after_s, repeat=True)

    def stop(self) -> None:
        """Count no more."""
        faulthandler.cancel_dump_traceback_later()
