"""What came before, by digest: counts and first names, in any number of threads, with memory that stays flat."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from afd.seen import Seen


def test_counts_and_first_names() -> None:
    with Seen() as seen:
        assert [seen.count(b"a"), seen.count(b"b"), seen.count(b"a"), seen.count(b"a")] == [0, 0, 1, 2]
        assert seen.first(b"c", "one") == "one"
        assert seen.first(b"c", "two") == "one"
        assert [digest in seen for digest in (b"a", b"c", b"d")] == [True, True, False]


def test_threads_count_every_digest_once() -> None:
    with Seen() as seen, ThreadPoolExecutor(4) as threads:
        before = list(threads.map(seen.count, [bytes([i % 7]) for i in range(350)]))
    assert sorted(before) == sorted(list(range(50)) * 7)


def test_memory_does_not_grow_with_the_digests() -> None:
    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    with Seen() as seen:
        for i in range(20_000):
            seen.count(hashlib.sha256(b"%d" % i).digest())
        before = held()
        for i in range(20_000, 60_000):
            seen.count(hashlib.sha256(b"%d" % i).digest())
        assert held() - before < 2000  # KiB; a set of them takes 6,000
        assert hashlib.sha256(b"7").digest() in seen
