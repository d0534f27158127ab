"""Examples as hypothesis draws them, and one run of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.check import Uninteresting, check_plan, prepare, trace_of, unstable
from tests.fuzz.drawing import draw_program
from tests.fuzz.plan_draws import draw_choice

HEADER, STATEMENT, PLAN = 24, 12, 12
MOST_STATEMENTS, MOST_PLANS = 14, 4


def fixed(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


EXAMPLES = st.tuples(
    fixed(HEADER),
    st.lists(fixed(STATEMENT), min_size=1, max_size=MOST_STATEMENTS),
    st.lists(fixed(PLAN), min_size=1, max_size=MOST_PLANS),
)


@dataclass(slots=True)
class Tally:
    """graphs, plans: that were compared; dull: programs that eager PyTorch cannot train, or whose result hangs on the
    last digit; failure: text of the last failure, the smallest one when hypothesis is done."""

    graphs: int = 0
    plans: int = 0
    dull: int = 0
    failure: str = ""
    errors: list[str] = field(default_factory=list)


def examine(drawn: tuple[bytes, list[bytes], list[bytes]], tally: Tally) -> None:
    """Compare one random model, traced and under its random plans, with eager execution."""
    header, statements, plans = drawn
    program = draw_program(header, statements)
    where = "trace"
    try:
        example = prepare(program)
        trace_of(example)
        for data in plans:
            choice = draw_choice(data)
            where = str(choice)
            tally.plans += check_plan(example, choice)
    except Uninteresting:
        tally.dull += 1
        hypothesis.reject()
    except Exception as error:
        if isinstance(error, AssertionError) and unstable(program):
            tally.dull += 1
            hypothesis.reject()
        tally.failure = f"{type(error).__name__}: {error}\n{where}\n\n{program.source()}\n{drawn!r}\n"
        raise
    tally.graphs += 1


def run(
    examples: int, seed: int | None, database: Any = None, replay: bool = True, tally: Tally | None = None
) -> Tally:
    """Examine that many random models. seed: None for the same ones every time.

    Raises what the first failure raises, with the smallest model that fails so; `Tally.failure` tells of it.
    """
    counts = tally or Tally()
    phases = [Phase.generate, Phase.shrink] + ([Phase.reuse] if replay else [])

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=seed is None,
        database=database,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(EXAMPLES)
    def every(drawn: tuple[bytes, list[bytes], list[bytes]]) -> None:
        examine(drawn, counts)

    test: Callable[[], None] = every if seed is None else hypothesis.seed(seed)(every)
    test()
    return counts
