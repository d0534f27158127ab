"""Measurements on disk: one SQLite file that any number of processes read and write.

Keys name everything that a measurement depends on (op, local shapes, device, versions), so an entry never goes stale;
a file that is damaged or of another schema is put aside and begun anew. A store never fails a plan: what cannot be
read was not measured, what cannot be written is measured again next time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SCHEMA = 2
ENVIRONMENT = "SHARDPLAN_CACHE"
"""Environment variable with the folder of the store; empty: keep nothing on disk."""

_WAIT_SECONDS = 30.0
_ABSURD_SECONDS = 1e4
_ABSURD_NBYTES = 1 << 44
_COLUMNS = "key, family, forward, backward, modelled_forward, modelled_backward, forward_scratch, backward_scratch"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured op. key: of the call on its device; family: op and device, for samples to learn from; modelled
    seconds: what the roofline says, forward and backward. scratch: bytes, see `OpCost`."""

    key: str
    family: str
    forward_seconds: float
    backward_seconds: float
    modelled_forward_seconds: float
    modelled_backward_seconds: float
    forward_scratch: int = 0
    backward_scratch: int = 0

    def is_sane(self) -> bool:
        """Whether these can be seconds of an op: a clock that jumped or a damaged row must not steer a plan."""
        numbers = (self.forward_seconds, self.backward_seconds, self.modelled_forward_seconds,
                   self.modelled_backward_seconds)  # fmt: skip
        sizes = self.forward_scratch, self.backward_scratch
        return all(
            isinstance(n, (int, float)) and math.isfinite(n) and 0 <= n <= _ABSURD_SECONDS for n in numbers
        ) and (all(isinstance(n, int) and 0 <= n <= _ABSURD_NBYTES for n in sizes))


class Store:
    """See the module docstring. path: the file, or ":memory:". Raises sqlite3.Error or OSError where there can be no
    such file; later trouble is logged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        self._may_write = True
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
        rows = self._read("SELECT value FROM texts WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put_text(self, key: str, value: str) -> None:
        """Keep a text; the newest stays."""
        self._write("INSERT OR REPLACE INTO texts VALUES (?, ?)", [(key, value)])

    def change_text(self, key: str, change: Callable[[str | None], str]) -> None:
        """Replace a text by what `change` makes of it; other processes wait, so that none of their changes is lost."""
        if not self._may_write:
            return
        try:
            with self._lock, self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                row = self._connection.execute("SELECT value FROM texts WHERE key = ?", (key,)).fetchone()
                self._connection.execute(
                    "INSERT OR REPLACE INTO texts VALUES (?, ?)", (key, change(row[0] if row else None))
                )
        except sqlite3.DatabaseError as error:
            self._failed_to_write(error)

    def sample(self, key: str) -> Sample | None:
        """The measurement of exactly this call."""
        found = [Sample(*row) for row in self._read(f"SELECT {_COLUMNS} FROM samples WHERE key = ?", key)]
        return found[0] if found and found[0].is_sane() else None

    def family(self, family: str) -> list[Sample]:
        """All measurements of an op on a device, whatever the shapes."""
        rows = self._read(f"SELECT {_COLUMNS} FROM samples WHERE family = ? ORDER BY key", family)
        return [sample for row in rows if (sample := Sample(*row)).is_sane()]

    def put_samples(self, samples: Iterable[Sample]) -> None:
        """Keep measurements; one that is there already wins, so that a plan does not change with the next run. What
        cannot be seconds is not kept."""
        self._write(
            # A row that is not sane is as good as none.
            f"INSERT INTO samples ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "family = excluded.family, forward = excluded.forward, backward = excluded.backward, "
            "modelled_forward = excluded.modelled_forward, modelled_backward = excluded.modelled_backward, "
            "forward_scratch = excluded.forward_scratch, backward_scratch = excluded.backward_scratch "
            f"WHERE NOT ifnull(forward BETWEEN 0 AND {_ABSURD_SECONDS} AND backward BETWEEN 0 AND {_ABSURD_SECONDS} "
            f"AND modelled_forward BETWEEN 0 AND {_ABSURD_SECONDS} "
            f"AND modelled_backward BETWEEN 0 AND {_ABSURD_SECONDS} "
            f"AND forward_scratch BETWEEN 0 AND {_ABSURD_NBYTES} "
            f"AND backward_scratch BETWEEN 0 AND {_ABSURD_NBYTES}, 0)",
            [astuple(sample) for sample in samples if sample.is_sane()],
        )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _read(self, query: str, key: str) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(query, (key,)).fetchall()
        except sqlite3.DatabaseError as error:
            self._give_up(error)
            return []

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if not self._may_write:
            return
        try:
            with self._lock, self._connection:
                self._connection.executemany(statement, rows)
        except sqlite3.DatabaseError as error:
            self._failed_to_write(error)

    def _failed_to_write(self, error: sqlite3.DatabaseError) -> None:
        if isinstance(error, sqlite3.OperationalError):
            # Locked for all of the busy timeout, full, read-only: the next write would wait as long again.
            self._may_write = False
            log.warning("%s: %s; measurements of this process are no longer kept", self.path, error)
        else:
            self._give_up(error)

    def _give_up(self, error: sqlite3.DatabaseError) -> None:
        """Go on in memory where the file was damaged after it was opened; the next process puts it aside."""
        log.warning("%s: %s", self.path, error)
        if isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError):
            return
        with self._lock:
            self._connection.close()
            self._connection = _prepared(sqlite3.connect(":memory:", check_same_thread=False))

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._try_connect()
        except sqlite3.OperationalError:
            raise  # locked, full, not allowed: nothing is wrong with the file
        except sqlite3.DatabaseError:
            with open(f"{self.path}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Another process may have put it aside while this one waited.
                try:
                    return self._try_connect()
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError as error:
                    log.warning("%s: %s; it is kept as %s.damaged and begun anew", self.path, error, self.path)
                    os.replace(self.path, f"{self.path}.damaged")
                    for rest in ("-wal", "-shm"):
                        Path(self.path + rest).unlink(missing_ok=True)
                    return self._try_connect()

    def _try_connect(self) -> sqlite3.Connection:
        return _prepared(sqlite3.connect(self.path, timeout=_WAIT_SECONDS, check_same_thread=False))


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection with the tables made. Raises sqlite3.DatabaseError where the file is damaged or foreign."""
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, 1, SCHEMA):
            raise sqlite3.DatabaseError(f"made by another version (schema {version})")
        with contextlib.suppress(sqlite3.OperationalError):
            # Readers do not wait for writers. Some network file systems cannot.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if version == 1:
                connection.execute("DROP TABLE IF EXISTS samples")  # without scratch: measured again
            connection.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, value TEXT)")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS samples (key TEXT PRIMARY KEY, family TEXT, forward REAL, "
                "backward REAL, modelled_forward REAL, modelled_backward REAL, forward_scratch INTEGER, "
                "backward_scratch INTEGER)"
            )
            connection.execute("CREATE INDEX IF NOT EXISTS by_family ON samples (family)")
            connection.execute(f"SELECT {_COLUMNS} FROM samples LIMIT 1")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
    except BaseException:
        connection.close()
        raise
    return connection


@lru_cache(maxsize=8)
def _opened(folder: str, pid: int) -> Store:
    """One connection per process and folder: SQLite connections do not survive a fork."""
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            return Store(Path(folder) / "costs.sqlite")
        except (OSError, sqlite3.Error) as error:
            log.warning("measurements are not kept: %s: %s", folder, error)
    return Store(":memory:")
