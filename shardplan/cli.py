"""The command line: ``shardplan plan | profile | report | diff | simulate | run | check | bench | doctor | cluster``.

torch is imported by the commands, not here, so that ``--help`` is fast. Facts go to stdout (with ``--json`` one object
and nothing else), everything else to stderr.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shardplan.cli_cluster import cluster_app, print_json
from shardplan.cli_flags import (
    Batch,
    BatchNorm,
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
    Objective,
    Output,
    Pin,
    Quiet,
    Seq,
    Solver,
    Target,
    TimeLimit,
    TraceFile,
    Verbose,
    WhatIfs,
    Zero,
    job_of,
    write,
)
from shardplan.cli_profile import profile_command
from shardplan.cli_simulate import simulate_command
from shardplan.errors import ShardplanError

app = typer.Typer(
    name="shardplan",
    help="Plan and run PyTorch models on many devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cluster_app, name="cluster")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (see SURFACE: 0 ok, 1 our bug, 2 usage, 3 no plan fits, ...)."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except SystemExit as error:  # how the parser ends: 0, or 2 for a command line that it cannot read
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ShardplanError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except Exception:
        traceback.print_exc()
        print("This is a bug in shardplan; please report it with the lines above.", file=sys.stderr)
        return 1
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        from shardplan import __version__

        print(f"shardplan {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="version")] = False,
) -> None:
    pass


@app.command("plan")
def plan_command(
    target: Target,
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
    batch_norm: BatchNorm = "global",
    zero: Zero = "auto",
    objective: Objective = "train",
    solver: Solver = "highs",
    time_limit: TimeLimit = 60.0,
    gap: Gap = 0.01,
    cache: Cache = True,
    what_if: WhatIfs = None,
    output: Output = None,
    html: Html = None,
    trace: TraceFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the fastest plan that fits, and say why it is."""
    from shardplan import cli_work
    from shardplan import what_if as variants

    wanted = variants.parse(what_if or ())
    job = job_of(locals(), progress=sys.stderr.isatty() and not quiet)
    found = cli_work.make_plan(job)
    others = variants.explore(job, wanted) if wanted else ()
    _show(found, output, html, trace, json, quiet, others)


@app.command("report")
def report_command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")],
    html: Html = None,
    trace: TraceFile = None,
    explain: Annotated[str | None, typer.Option(help="explain what happens to this module or tensor (a glob)")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the report of a plan file."""
    from shardplan.planner.plan import Plan

    found = Plan.load(plan)
    if explain is not None:
        from shardplan.planner import report

        text = report.explain(found, explain)
        print_json({"pattern": explain, "lines": text.splitlines()}) if json else print(text.rstrip())
        return
    _show(found, None, html, trace, json, quiet)


@app.command("diff")
def diff_command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="another one")],
    json: Json = False,
) -> None:
    """Show what differs between two plan files."""
    from dataclasses import asdict

    from shardplan.planner import report
    from shardplan.planner.plan import Plan

    plans = Plan.load(plan), Plan.load(other)
    if json:
        print_json({"changes": [asdict(change) for change in report.changes(*plans)]})
    else:
        print(report.diff(*plans).rstrip())


@app.command("run")
def run_command(
    target: Target,
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
    batch_norm: BatchNorm = "global",
    zero: Zero = "auto",
    plan: Annotated[Path | None, typer.Option(help="use this plan file instead of planning")] = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 10,
    lr: Annotated[float, typer.Option(help="learning rate (AdamW)")] = 3e-4,
    seed: Annotated[int, typer.Option(help="of weights, random inputs and dropout")] = 0,
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
    """Train for a few steps on the factory's batch, or on random inputs; print losses, predicted and measured time."""
    from shardplan import cli_work

    job = job_of(locals())
    found = cli_work.train(job, plan, steps, lr, seed, quiet or json)
    if found is None:  # a rank other than the first
        return
    from shardplan.planner import report

    if output:
        write(output, found.plan.to_json())
    if html:
        write(html, report.render_html(found.plan, found.measured))
    if trace:
        write(trace, report.render_trace(found.plan, found.measured))
    if json:
        print(found.to_json())


app.command("simulate")(simulate_command)
app.command("profile")(profile_command)


@app.command("check")
def check_command(
    target: Target,
    devices: Devices = "2",
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
    batch_norm: BatchNorm = "global",
    zero: Zero = "auto",
    plan: Annotated[Path | None, typer.Option(help="check this plan file instead of planning")] = None,
    tolerance: Annotated[float | None, typer.Option(help="relative error that is allowed; default: measured")] = None,
    seed: Annotated[int, typer.Option(help="of weights, random inputs and dropout")] = 0,
    solver: Solver = "highs",
    time_limit: TimeLimit = 60.0,
    gap: Gap = 0.01,
    cache: Cache = True,
    output: Output = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the plan and the model on one device on the same batch; compare loss, gradients, buffers and outputs.

    Exit status 7 where they differ; the first op at fault is named.
    """
    from shardplan import cli_work

    job = job_of(locals())
    found = cli_work.check(job, plan, tolerance, seed)
    if output:
        write(output, found.plan.to_json())
    if json:
        print(found.to_json())
    elif not quiet or not found.equal:
        print(found)
    if not found.equal:
        raise typer.Exit(7)


@app.command("doctor")
def doctor_command(json: Json = False) -> None:
    """Say what on this machine keeps jobs from running, or makes them slow, and what to do. Exit status 7 if any."""
    from shardplan import doctor

    findings = doctor.examine()
    if json:
        print(doctor.to_json(findings))
    else:
        doctor.print_findings(findings)
    if doctor.failed(findings):
        raise typer.Exit(7)


@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_command(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="which one; without, or with --json alone: what there is")
    ] = None,
) -> None:
    """Run a benchmark of this checkout; what follows its name is for it (NAME -- --help). Its status is ours."""
    from shardplan import bench

    if name in (None, "--json"):  # flags of a benchmark are not ours to read
        known = bench.benchmarks()
        if name:
            print_json({"benchmarks": known})
        else:
            print("\n".join(f"{each:14} {summary}" for each, summary in known.items()))
        return
    if status := bench.run(name, context.args):
        raise typer.Exit(status)


def _show(
    plan: Any,
    output: Path | None,
    html: Path | None,
    trace: Path | None,
    json: bool,
    quiet: bool,
    what_if: tuple[Any, ...] = (),
) -> None:
    from shardplan.planner import report

    if output:
        write(output, plan.to_json())
    if html:
        write(html, report.render_html(plan, None, what_if))
    if trace:
        write(trace, report.render_trace(plan))
    if json:
        print(report.render_json(plan, None, what_if).rstrip())
    elif not quiet:
        report.print_report(plan, None, what_if)
