"""How far long work on many things is: a bar on a terminal, a line now and then in a log, with the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_EVERY_SECONDS = 2.0
"""Between lines of a log; work that is done sooner says nothing."""


class Items:
    """``with Items("weights", 800, shown=rank == 0) as items: ... items.done()``.

    what: the things; total: how many; shown: whether anything is said at all.
    """

    def __init__(self, what: str, total: int, shown: bool = True, stream: TextIO | None = None) -> None:
        self.what, self.total = what, total
        self.count = 0
        self._shown = shown and total > 0
        self._stream = stream or sys.stderr
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Items:
        self._started = self._said = time.monotonic()
        if self._shown and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def done(self, count: int = 1) -> None:
        """So many more are done."""
        self.reach(self.count + count)

    def reach(self, count: int, total: int | None = None) -> None:
        """So many are done, of a total that may have become another one."""
        self.count, self.total = count, total or self.total
        if self._bar is not None:
            self._bar.update(self._task, completed=count, total=self.total)
        elif self._shown and time.monotonic() - self._said >= _EVERY_SECONDS:
            self._said = time.monotonic()
            left = (self._said - self._started) / max(count, 1) * (self.total - count)
            text = f"shardplan: {self.what} {count} of {self.total}, about {left:.0f} s left"
            print(text, file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
