"""What came before, counted on the disk: memory does not grow with the number of videos. Knows no video."""

from __future__ import annotations

import sqlite3
import threading
from types import TracebackType


class Seen:
    """Digests with their counts and the name that brought them first: a temporary SQLite database, gone when closed.

    SQLite keeps half a MiB of it in memory and the rest in a nameless file of the system's temporary folder. Threads
    may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA cache_size = -512")  # KiB
        self._database.execute("PRAGMA journal_mode = OFF")  # nothing of it outlives the process
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, first TEXT, count INTEGER) WITHOUT ROWID")

    def count(self, digest: bytes) -> int:
        """Count one more of a digest and return how many there were before."""
        insert = (
            "INSERT INTO seen VALUES (?, '', 1) ON CONFLICT (digest) DO UPDATE SET count = count + 1 RETURNING count"
        )
        with self._lock:
            return self._database.execute(insert, (digest,)).fetchone()[0] - 1

    def first(self, digest: bytes, name: str) -> str:
        """The name that brought a digest first; from now on this one, if none did."""
        with self._lock:
            self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, 1)", (digest, name))
            return self._database.execute("SELECT first FROM seen WHERE digest = ?", (digest,)).fetchone()[0]

    def __contains__(self, digest: bytes) -> bool:
        with self._lock:
            return self._database.execute("SELECT 1 FROM seen WHERE digest = ?", (digest,)).fetchone() is not None

    def close(self) -> None:
        """Free the database."""
        self._database.close()

    def __enter__(self) -> Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
