"""``shardplan profile``: measure ops here, run a plan, set prediction beside measurement, keep corrections."""

from __future__ import annotations

import sys
from json import dumps
from typing import Annotated, Any

import typer

from shardplan.cli_flags import (
    Batch,
    Cache,
    ClusterFile,
    Degree,
    Devices,
    Gap,
    Html,
    Input,
    Json,
    MemoryLimit,
    Microbatches,
    Output,
    Pin,
    Quiet,
    Seq,
    Solver,
    TimeLimit,
    TraceFile,
    Verbose,
    job_of,
    write,
)

Option = typer.Option


def profile_command(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="file.py:factory or hf:CONFIG.json")] = None,
    devices: Devices = "auto",
    cluster: ClusterFile = None,
    input: Input = None,
    batch: Batch = None,
    seq: Seq = None,
    memory: MemoryLimit = None,
    pin: Pin = None,
    dp: Degree = None,
    tp: Degree = None,
    pp: Degree = None,
    microbatches: Microbatches = None,
    budget: Annotated[float, Option(min=0.0, help="seconds for measuring ops")] = 40.0,
    steps: Annotated[int, Option(min=1, help="steps to measure")] = 10,
    store: Annotated[
        bool | None, Option("--store/--no-store", help="keep corrections for the plans to come (asked on a terminal)")
    ] = None,
    reset: Annotated[bool, Option("--reset", help="forget the corrections of these devices")] = False,
    solver: Solver = "highs",
    time_limit: TimeLimit = 60.0,
    gap: Gap = 0.01,
    cache: Cache = True,
    output: Output = None,
    html: Html = None,
    trace: TraceFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure ops, run the plan, print predicted against measured; offer to correct the plans to come."""
    from shardplan import profiling
    from shardplan.errors import UsageError
    from shardplan.planner import report

    if reset:
        forgotten = profiling.reset(devices)
        if not quiet:
            print(f"forgot the corrections of {forgotten} measured jobs", file=sys.stderr)
        if target is None:
            return
    if target is None:
        raise UsageError("profile needs a TARGET", hints=["shardplan profile model.py:factory --devices 2"])
    found = profiling.run(job_of(locals()), budget, steps, progress=not quiet)
    if found is None:  # a rank other than the first
        return
    if store is None:
        store = sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("keep corrections?", err=True)
    if store:
        found.keep()
    for path, render in ((output, None), (html, report.render_html), (trace, report.render_trace)):
        if path is not None:
            write(path, render(found.plan, found.measured) if render else found.plan.to_json())
    if json:
        print(dumps(found.to_dict(stored=bool(store)), indent=1))
    elif not quiet:
        _show(found.rows())


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from shardplan.planner.units import format_nbytes

    table = Table("what", "predicted", "measured", "measured / predicted")
    for row in rows:
        values = (row["predicted"], row["measured"])
        texts = [format_nbytes(round(v)) if row["unit"] == "bytes" else f"{v * 1e3:.3f} ms" for v in values]
        ratio = values[1] / values[0] if values[0] > 0 else None
        table.add_row(row["name"], *texts, f"{ratio:.3f}" if ratio is not None else "-")
    Console().print(table)
