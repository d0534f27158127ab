"""What long work says of itself: bars and one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import io
import re

import pytest

from shardplan import progress
from shardplan.runtime import progress as items


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by hand."""
    now = [0.0]
    monkeypatch.setattr(items.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_with_the_time_left(clock):
    log = io.StringIO()
    with items.Items("weights", 100, stream=log) as made:
        for count in range(100):
            clock[0] = count * 0.1
            made.done()
    lines = log.getvalue().splitlines()
    assert lines[0] == "shardplan: weights 21 of 100, about 8 s left"
    assert len(lines) == 4 and all(re.fullmatch(r"shardplan: weights \d+ of 100, about \d s left", x) for x in lines)


def test_quick_work_and_other_ranks_say_nothing(clock):
    for shown, seconds in ((True, 0.01), (False, 10.0)):
        log = io.StringIO()
        with items.Items("weights", 3, shown, log) as made:
            for _ in range(3):
                clock[0] += seconds
                made.done()
        assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away():
    terminal = Terminal()
    with items.Items("weights", 4, stream=terminal) as made:
        made.reach(2, 8)
        assert (made.count, made.total) == (2, 8)
    assert "weights" in terminal.getvalue() and "shardplan:" not in terminal.getvalue()


def test_planning_says_every_line_in_a_log_and_the_newest_on_a_terminal():
    log, terminal = io.StringIO(), Terminal()
    teller = progress.Teller(log)
    with progress.live(teller):
        teller("pp1: 3.00 ms, best 3.00 ms, bound 2.90 ms, gap 3.3%")
    assert log.getvalue() == "shardplan: pp1: 3.00 ms, best 3.00 ms, bound 2.90 ms, gap 3.3%\n"
    teller = progress.Teller(terminal)
    with progress.live(teller), progress.live(teller):
        teller("pp1 [a]")
    teller("done")
    assert terminal.getvalue().endswith("shardplan: done\n")
    with progress.live(progress.say_nothing):
        pass
