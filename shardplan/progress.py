"""What planning says of itself: the newest line beside a spinner on a terminal, every line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

Say = Callable[[str], None]


def say_nothing(text: str) -> None:
    pass


class Teller:
    """Says lines on a stream. While it is `live` on a terminal only the newest is shown, with the seconds so far."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._status: Any = None
        self._started = 0.0

    @property
    def stream(self) -> TextIO:
        return self._stream or sys.stderr  # looked up when something is said: tests and notebooks replace it

    def __call__(self, text: str) -> None:
        if self._status is not None:
            self._status.update(f"{text} [{time.monotonic() - self._started:.0f} s]".replace("[", r"\["))
        else:
            print(f"shardplan: {text}", file=self.stream, flush=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Until the end of this context lines replace one another, on a terminal."""
        if not self.stream.isatty() or self._status is not None:
            yield
            return
        from rich.console import Console

        self._started = time.monotonic()
        self._status = Console(file=self.stream).status("planning")
        self._status.start()
        try:
            yield
        finally:
            self._status.stop()
            self._status = None


say_on_stderr = Teller()


@contextmanager
def live(say: Say) -> Iterator[None]:
    """`Teller.live`, of whatever says things."""
    if isinstance(say, Teller):
        with say.live():
            yield
    else:
        yield
