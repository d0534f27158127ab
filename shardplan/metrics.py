"""Metrics of training steps: to a callback, a JSONL file, TensorBoard, and timelines for Perfetto."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.errors import UsageError
from shardplan.planner.timeline import chrome_trace
from shardplan.runtime.metering import StepRecord


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step. step: its number, from 0; loss: of the global batch; seconds: by the caller's clock; samples: of the
    batch. detail: of every n-th step, else None."""

    step: int
    loss: float
    seconds: float
    samples: int
    detail: StepRecord | None = None

    def numbers(self) -> dict[str, float]:
        """Flat, by name: what JSONL and TensorBoard get."""
        found = {
            "loss": self.loss,
            "seconds": self.seconds,
            "samples_per_s": self.samples / self.seconds if self.seconds else 0.0,
        }
        if self.detail is not None:
            found |= {f"seconds/{phase}": value for phase, value in sorted(self.detail.phases.items())}
            found |= {
                "bubble": self.detail.bubble,
                "nbytes/messages": self.detail.message_nbytes,
                "nbytes/collectives": self.detail.collective_nbytes,
                "nbytes/memory_max": max(self.detail.memory_nbytes),
            }
        return found


Callback = Callable[[StepMetrics], Any]


class Metrics:
    """Where metrics go; see `ParallelModel.metrics`. writes: False where another process does (ranks but rank 0)."""

    def __init__(
        self,
        callback: Callback | None,
        jsonl: str | os.PathLike[str] | None,
        tensorboard: str | os.PathLike[str] | None,
        traces: str | os.PathLike[str] | None,
        every: int,
        writes: bool,
    ) -> None:
        if every < 0:
            raise UsageError(f"every={every}", hints=["every=100 takes each 100th step apart; 0: none"])
        self.every = every
        self._callback = callback
        self._file = open(jsonl, "a", buffering=1) if jsonl is not None and writes else None  # noqa: SIM115
        self._board = _summary_writer(tensorboard) if tensorboard is not None and writes else None
        self._traces = Path(traces) if traces is not None and writes else None
        if self._traces is not None:
            self._traces.mkdir(parents=True, exist_ok=True)

    def wants_detail(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def give(self, found: StepMetrics) -> None:
        """Pass the metrics of a step on. What the callback raises comes through."""
        numbers = found.numbers()
        if self._file is not None:
            self._file.write(json.dumps({"step": found.step, "time": time.time(), **numbers}) + "\n")
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, found.step)
        if self._traces is not None and found.detail is not None:
            (self._traces / f"step-{found.step:08d}.trace.json").write_text(chrome_trace([found.detail.timeline]))
        if self._callback is not None:
            self._callback(found)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(directory: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("tensorboard= needs the package tensorboard", hints=["pip install tensorboard"]) from error
    return SummaryWriter(os.fspath(directory))
