"""Branches on the numbers in a tensor that only check them: ``if (variance < 0).any(): raise ...``, ``assert ...``.

Tracing has no numbers, and a graph no branches. But where one side of a branch does nothing but raise, the graph is the
other side. Which one that is, tracing finds out. A question about numbers is answered with False. If the model raises
then, the answer was wrong and is turned. If it goes on to the end, the answer is turned in a trial of its own: where
the trial raises, the branch was a check; where it goes on as well, it is a branch, and tracing fails there.

What raises has to be a ``raise`` or an ``assert`` that is executed, not an op that fails.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from shardplan.errors import ShardplanError

T = TypeVar("T")

MOST_QUESTIONS = 64
_TORCH = Path(torch.__file__).parent
# Where PyTorch traces; its own checks of arguments (torch.nn, torch.distributions) are checks like any other.
_TRACER = tuple(
    str(_TORCH / part)
    for part in (
        *("fx", "_subclasses", "_dynamo", "_export", "export", "utils", "_library", "_higher_order_ops", "_prims"),
        *("_ops.py", "overrides.py", "_tensor.py", "_prims_common"),
    )
)
# In the traceback of an op that fails.
_OPS = tuple(str(_TORCH / part) for part in ("_subclasses", "_meta_registrations.py", "_refs", "_decomp", "_prims"))
_HERE = str(Path(__file__).parent)
_SYMBOLS = str(_TORCH / "__init__.py")  # SymBool.__bool__, but also torch._assert
_RAISE = dis.opmap["RAISE_VARARGS"]


class WentOn(BaseException):
    """A trial asked its next question: the turned answer did not make it raise. Passes by whoever handles errors."""


@dataclass(slots=True)
class Answers:
    """What tracing says to questions about numbers.

    known: the first answers; later ones are False. trial: there is none behind the known ones, but WentOn. refusing: a
    question behind the known ones, and whatever the model raises, fails as it would without us. asked: the places
    (statements "file:line", innermost first) that asked, in order, in the last attempt.
    """

    known: list[bool] = field(default_factory=list)
    trial: bool = False
    refusing: bool = False
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def checked(self, error: Exception) -> bool:
        """Whether the model raised an error that may be the work of a check."""
        return bool(self.asked) and not self.refusing and bool(raised_by(error))

    def answer(self, error: Exception, place: tuple[str, ...]) -> bool:
        """The next answer. Raises the error where there is none."""
        number = len(self.asked)
        if number < len(self.known):
            self.asked.append(place)
            return self.known[number]
        if self.trial:
            raise WentOn
        if self.refusing or number >= MOST_QUESTIONS:
            raise error
        self.asked.append(place)
        return False

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Answer the questions of one attempt."""
        from torch.fx.experimental.sym_node import SymNode
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        self.asked.clear()
        own, answers = SymNode.guard_bool, self

        def guard_bool(self: SymNode, file: str, line: int) -> bool:
            try:
                return own(self, file, line)
            except GuardOnDataDependentSymNode as error:
                return answers.answer(error, _place(sys._getframe(1)))

        SymNode.guard_bool = guard_bool
        try:
            yield
        finally:
            SymNode.guard_bool = own


def settle(attempt: Callable[[Answers], T]) -> tuple[T, list[str]]:
    """What ``attempt(answers)`` returns once all questions about numbers are answered, and a note per check.

    attempt: traces within ``answers.given()``; where ``answers.checked(error)`` the error passes it.
    """
    known: list[bool] = []
    raisers: dict[tuple[str, ...], str] = {}
    while True:
        answers = Answers(known)
        try:
            found = attempt(answers)
            break
        except Exception as error:
            last = len(answers.asked) - 1
            if not answers.checked(error):
                raise
            if last < len(known):
                return attempt(Answers(known, refusing=True)), []
            raisers[answers.asked[last]] = raised_by(error)
            known = [*known, *[False] * (last - len(known)), True]
    known = [*known, *[False] * (len(answers.asked) - len(known))]
    for number, place in enumerate(answers.asked):
        if place not in raisers:
            raiser = _trial(attempt, Answers([*known[:number], not known[number]], trial=True))
            if not raiser:
                return attempt(Answers(known[:number], refusing=True)), []
            raisers[place] = raiser
    return found, [f"a check of the numbers is passed over: {raiser}" for raiser in dict.fromkeys(raisers.values())]


def _trial(attempt: Callable[[Answers], Any], answers: Answers) -> str:
    try:
        attempt(answers)
    except WentOn:
        return ""
    except Exception as error:
        return raised_by(error)
    return ""


def raised_by(error: BaseException) -> str:
    """ "ValueError at file:line" where a statement of the model, or of a library that it calls, raised; else ""."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        links = list(_tracebacks(link))
        if links and not isinstance(link, ShardplanError) and not _is_tracer(links[-1].tb_frame):
            code = links[-1].tb_frame.f_code
            in_op = any(part.tb_frame.f_code.co_filename.startswith(_OPS) for part in links)
            if not in_op and code.co_code[links[-1].tb_lasti] == _RAISE:
                return f"{type(link).__name__} at {code.co_filename}:{links[-1].tb_lineno}"
        link = link.__cause__ or link.__context__
    return ""


def _tracebacks(error: BaseException) -> Iterator[TracebackType]:
    part = error.__traceback__
    while part is not None:
        yield part
        part = part.tb_next


def _is_tracer(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.startswith((*_TRACER, _HERE)) or (code.co_filename, code.co_name) == (_SYMBOLS, "__bool__")


def _place(frame: FrameType | None) -> tuple[str, ...]:
    """The statement that asks and those that called it, innermost first, without the tracer's."""
    found = []
    while frame is not None:
        if not _is_tracer(frame):
            found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(found)
