"""Many requests at a time, their outcomes in the order of the requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from afd.teachers.base import SourceReject, SourceVideo, VideoRequest

# Requests begun beyond the one whose turn it is, per thread: what a slow one may hold up.
_AHEAD = 8


def obtain_in_order(
    requests: Iterable[VideoRequest | SourceReject],
    wanted: Callable[[VideoRequest], bool],
    obtain: Callable[[VideoRequest], SourceVideo | SourceReject | None],
    *,
    num_threads: int,
    stop: Callable[[], None],
) -> Generator[SourceVideo | SourceReject | None]:
    """Run `obtain` for the wanted requests on `num_threads` threads; yield its results, and the rejects, in order.

    Args:
        stop: called when the iteration ends, for whatever reason; makes running `obtain`s return soon.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="teacher")
    window: deque[SourceReject | Future[SourceVideo | SourceReject | None]] = deque()
    try:
        for request in requests:
            if isinstance(request, SourceReject):
                window.append(request)
            elif wanted(request):
                window.append(pool.submit(obtain, request))
            while len(window) > num_threads * _AHEAD:
                yield _outcome(window.popleft())
        while window:
            yield _outcome(window.popleft())
    finally:
        stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(item: SourceReject | Future[SourceVideo | SourceReject | None]) -> SourceVideo | SourceReject | None:
    return item if isinstance(item, SourceReject) else item.result()
