"""Errors that a user can cause or meet. Each has a code, a one-line title, an explanation with numbers, and hints.

Prints as::

    SP301 NoFeasiblePlan: does not fit on 2 x A10G (22.1 GiB usable each).
      Smallest reachable peak: 27.4 GiB on device 1, 5.3 GiB over.
      Hint: drop the tie: fits in 21.8 GiB, step time +3 %

Codes: SP1xx input and usage, SP2xx tracing, SP3xx planning, SP4xx plan files, SP5xx running. `exit_status` is the exit
status of the command line. This module imports nothing, so that every layer may raise these.
"""

from __future__ import annotations

from collections.abc import Sequence


class ShardplanError(Exception):
    """Base of all errors that shardplan raises on purpose.

    title: one line, no final newline. details: further lines with numbers. hints: changes that help; each one checked.
    """

    code = "SP000"
    exit_status = 1

    def __init__(self, title: str, details: Sequence[str] = (), hints: Sequence[str] = ()) -> None:
        self.title = title
        self.details = tuple(details)
        self.hints = tuple(hints)
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.code} {type(self).__name__}: {self.title}"]
        lines += [f"  {line}" for line in self.details]
        lines += [f"  Hint: {hint}" for hint in self.hints]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.title, self.details, self.hints)


class UsageError(ShardplanError):
    """An argument or flag that makes no sense."""

    code = "SP101"
    exit_status = 2


class NoMatch(UsageError):
    """A glob of a constraint or pin that matches nothing; hints name the nearest matches."""

    code = "SP102"


class ClusterFileError(UsageError):
    """A cluster description that cannot be read or does not make sense."""

    code = "SP103"


class TargetError(UsageError):
    """A command-line TARGET that cannot be loaded."""

    code = "SP104"


class InputMismatch(UsageError):
    """A batch whose structure, shapes or dtypes are not those that were planned for."""

    code = "SP105"


class BatchNotDivisible(UsageError):
    """A global batch that does not divide over replicas and microbatches."""

    code = "SP106"


class NotSupported(UsageError):
    """A legal setting that this version cannot honour; never ignored silently."""

    code = "SP107"


class NotTraceable(ShardplanError):
    """The model cannot be captured as one graph; names file and line. module: qualified name of the innermost submodule
    in which it failed ("" for the model itself), None where that is not known."""

    code = "SP201"
    exit_status = 5
    module: str | None = None


class NoFeasiblePlan(ShardplanError):
    """No plan fits the memory limits and constraints; says by how many bytes and where."""

    code = "SP301"
    exit_status = 3


class ConflictingConstraints(ShardplanError):
    """The constraints exclude every plan, memory aside."""

    code = "SP302"
    exit_status = 3


class SolverTimeout(ShardplanError):
    """The time limit passed before any plan was found."""

    code = "SP303"
    exit_status = 4


class SolverUnavailable(ShardplanError):
    """The named solver is not installed or crashed."""

    code = "SP304"
    exit_status = 2


class PlanMismatch(ShardplanError):
    """A plan that was made for another model, batch or cluster."""

    code = "SP401"
    exit_status = 6


class PlanFileError(ShardplanError):
    """A plan file that cannot be read."""

    code = "SP402"
    exit_status = 6


class CheckpointError(ShardplanError):
    """A checkpoint that is missing, torn, or not of this model."""

    code = "SP403"
    exit_status = 6


class WorldSizeMismatch(ShardplanError):
    """The number of processes is not the number of devices in the plan."""

    code = "SP501"
    exit_status = 6


class NotRunnableHere(ShardplanError):
    """A plan for devices that this machine does not have; hints give the torchrun line."""

    code = "SP502"
    exit_status = 6


class WorkerFailed(ShardplanError):
    """A worker raised, exited or was killed; carries its traceback or exit status, and its rank (-1: not known)."""

    code = "SP503"
    rank = -1


class WorkerTimeout(ShardplanError):
    """A worker did not answer, or gave no sign of life, within the time limit; carries its rank (-1: not known)."""

    code = "SP504"
    rank = -1


class Deadlock(ShardplanError):
    """An instruction list that cannot finish; found by simulation before anything is launched."""

    code = "SP505"


class Overloaded(ShardplanError):
    """More inference requests wait than the engine's queue holds."""

    code = "SP507"


class LeafChanged(ShardplanError):
    """A submodule that is kept whole did something else than when it was traced: its results have other shapes, or
    plain values beside the tensors differ."""

    code = "SP506"
