"""Measurements on disk: one SQLite file that any number of processes read and write.

Keys name everything that a measurement depends on (op, local shapes, device, versions), so an entry never goes stale;
a file that is damaged or of another schema is put aside and begun anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SCHEMA = 1
ENVIRONMENT = "SHARDPLAN_CACHE"
"""Environment variable with the folder of the store; empty: keep nothing on disk."""

_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured op. key: of the call on its device; family: op and device, for samples to learn from; modelled
    seconds: what the roofline says, forward and backward."""

    key: str
    family: str
    forward_seconds: float
    backward_seconds: float
    modelled_forward_seconds: float
    modelled_backward_seconds: float


class Store:
    """See the module docstring. path: the file, or ":memory:"."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._connection = self._connect()

    @staticmethod
    def open() -> Store:
        """The user's store; in memory where there is no place to write."""
        folder = os.environ.get(ENVIRONMENT)
        if folder is None:
            import platformdirs

            folder = platformdirs.user_cache_dir("shardplan", appauthor=False)
        return _opened(folder, os.getpid())

    def get_text(self, key: str) -> str | None:
        """A text that `put_text` kept."""
        with self._lock:
            row = self._connection.execute("SELECT value FROM texts WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put_text(self, key: str, value: str) -> None:
        with self._lock, self._connection:
            self._connection.execute("INSERT OR REPLACE INTO texts VALUES (?, ?)", (key, value))

    def sample(self, key: str) -> Sample | None:
        """The measurement of exactly this call."""
        with self._lock:
            row = self._connection.execute("SELECT * FROM samples WHERE key = ?", (key,)).fetchone()
        return Sample(*row) if row else None

    def family(self, family: str) -> list[Sample]:
        """All measurements of an op on a device, whatever the shapes."""
        with self._lock:
            rows = self._connection.execute("SELECT * FROM samples WHERE family = ? ORDER BY key", (family,)).fetchall()
        return [Sample(*row) for row in rows]

    def put_samples(self, samples: Iterable[Sample]) -> None:
        """Keep measurements; one that is there already wins, so that a plan does not change with the next run."""
        rows = [
            (s.key, s.family, s.forward_seconds, s.backward_seconds, s.modelled_forward_seconds,
             s.modelled_backward_seconds)
            for s in samples
        ]  # fmt: skip
        with self._lock, self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        for attempt in range(2):
            connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, check_same_thread=False)
            try:
                with _closed_on_error(connection):
                    (version,) = connection.execute("PRAGMA user_version").fetchone()
                    if version not in (0, SCHEMA):
                        raise sqlite3.DatabaseError(f"schema {version}")
                    with connection:
                        connection.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, value TEXT)")
                        connection.execute(
                            "CREATE TABLE IF NOT EXISTS samples (key TEXT PRIMARY KEY, family TEXT, forward REAL, "
                            "backward REAL, modelled_forward REAL, modelled_backward REAL)"
                        )
                        connection.execute("CREATE INDEX IF NOT EXISTS by_family ON samples (family)")
                        connection.execute(f"PRAGMA user_version = {SCHEMA}")
                return connection
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                if attempt:
                    raise
                aside = Path(f"{self.path}.damaged")
                os.replace(self.path, aside)
        raise AssertionError


@contextlib.contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


@lru_cache(maxsize=8)
def _opened(folder: str, pid: int) -> Store:
    """One connection per process and folder: SQLite connections do not survive a fork."""
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            return Store(Path(folder) / "costs.sqlite")
        except (OSError, sqlite3.Error):
            pass
    return Store(":memory:")
