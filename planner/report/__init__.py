"""The report of a plan: one set of facts, shown on a terminal, as plain text, HTML, JSON and a Chrome trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.errors import UsageError
from shardplan.planner.plan import Plan, write_atomically
from shardplan.planner.report.diff import changes, diff
from shardplan.planner.report.explain import explain
from shardplan.planner.report.facts import Facts, facts
from shardplan.planner.report.html_form import notebook, render_html
from shardplan.planner.report.json_form import render_json
from shardplan.planner.report.measured import Measured
from shardplan.planner.report.visualize import visualize
from shardplan.planner.report.what_if import WhatIf
from shardplan.planner.timeline import chrome_trace

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Facts",
    "Measured",
    "WhatIf",
    "changes",
    "diff",
    "explain",
    "facts",
    "notebook",
    "print_report",
    "render_html",
    "render_json",
    "render_terminal",
    "render_text",
    "render_trace",
    "visualize",
    "write_report",
]


def render_terminal(
    plan: Plan, console: Console, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()
) -> None:
    """Print the report to a rich console; its width and colours are the console's."""
    from shardplan.planner.report import terminal

    terminal.render_terminal(plan, console, measured, what_if)


def render_text(plan: Plan, measured: Measured | None = None, width: int = 100) -> str:
    """The report as plain text."""
    from shardplan.planner.report import terminal

    return terminal.render_text(plan, measured, width)


def print_report(plan: Plan, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()) -> None:
    """Print the report to standard output; without colours where that is not a terminal."""
    from shardplan.planner.report import terminal

    terminal.print_report(plan, measured, what_if)


def render_trace(plan: Plan, measured: Measured | None = None) -> str:
    """Chrome trace JSON: the predicted timeline and, where there is one, the measured one."""
    return chrome_trace(facts(plan, measured).timelines)


def write_report(plan: Plan, path: str | os.PathLike[str], measured: Measured | None = None) -> None:
    """Write the report in the form that the name asks for: ``.html``, ``...trace.json``, ``.json``, ``.txt``, ``.md``.

    The file is whole or untouched. Raises UsageError on another suffix or a path that cannot be written.
    """
    target = Path(path)
    name = target.name.lower()
    if name.endswith((".html", ".htm")):
        text = render_html(plan, measured)
    elif name.endswith("trace.json"):
        text = render_trace(plan, measured)
    elif name.endswith(".json"):
        text = render_json(plan, measured)
    elif name.endswith(".txt"):
        text = render_text(plan, measured)
    elif name.endswith(".md"):
        text = f"```\n{render_text(plan, measured)}```\n"
    else:
        raise UsageError(
            f"no report format for {target.name!r}", hints=["end the name with .html, trace.json, .json, .txt or .md"]
        )
    try:
        write_atomically(target, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {target}", [str(error)]) from error
