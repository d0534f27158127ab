"""``shardplan profile``: measure ops here, run a plan, set prediction beside measurement, keep corrections."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Option = typer.Option


def profile_command(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="file.py:factory or hf:CONFIG.json")] = None,
    devices: Annotated[str, Option(help='devices of this machine: 2, "cpu:2", "cuda:2" or auto')] = "auto",
    input: Annotated[list[str] | None, Option(help="an input of the batch, such as ids=int64[8,2048]")] = None,
    batch: Annotated[int | None, Option(help="global batch size (hf: targets)")] = None,
    seq: Annotated[int | None, Option(help="sequence length (hf: targets)")] = None,
    dp: Annotated[int | None, Option(help="force this degree")] = None,
    tp: Annotated[int | None, Option(help="force this degree")] = None,
    pp: Annotated[int | None, Option(help="force this degree")] = None,
    microbatches: Annotated[int | None, Option(help="force this number of microbatches")] = None,
    budget: Annotated[float, Option(min=0.0, help="seconds for measuring ops")] = 40.0,
    steps: Annotated[int, Option(min=1, help="steps to measure")] = 10,
    store: Annotated[
        bool | None, Option("--store/--no-store", help="keep corrections for the plans to come (asked on a terminal)")
    ] = None,
    reset: Annotated[bool, Option("--reset", help="forget the corrections of these devices")] = False,
    json_output: Annotated[bool, Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, Option("-q", "--quiet", help="print nothing but errors and --json")] = False,
) -> None:
    """Measure ops, run the plan, print predicted against measured; offer to correct the plans to come."""
    from shardplan import profiling
    from shardplan.errors import UsageError

    if reset:
        forgotten = profiling.reset(devices)
        if not quiet:
            print(f"forgot the corrections of {forgotten} measured jobs", file=sys.stderr)
        if target is None:
            return
    if target is None:
        raise UsageError("profile needs a TARGET", hints=["shardplan profile model.py:factory --devices 2"])
    degrees = {name: value for name, value in (("dp", dp), ("tp", tp), ("pp", pp)) if value is not None}
    job = profiling.Profiled(target, devices, tuple(input or ()), batch, seq, degrees, microbatches, budget, steps)
    found = profiling.run(job, progress=not quiet)
    if found is None:  # a rank other than the first
        return
    if store is None:
        store = sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("keep corrections?", err=True)
    if store:
        found.keep()
    if json_output:
        print(json.dumps(found.to_dict(stored=bool(store)), indent=1))
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
