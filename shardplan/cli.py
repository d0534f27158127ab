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


def _complete_target(start: str) -> list[str]:
    """Names of shipped configurations, for the shell."""
    if not start.startswith("hf:"):
        return ["hf:"] if "hf:".startswith(start) else []
    from shardplan import configs

    return [f"hf:{name}" for name in configs.names() if f"hf:{name}".startswith(start)]


Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        autocompletion=_complete_target,
        help="file.py:factory, package.module:factory, hf:CONFIG.json or hf:NAME, such as hf:llama-3-8b",
    ),
]
Devices = Annotated[str, typer.Option(help='2, "cpu:2", "8xh100", "dgx-h100:4", a .toml file or auto')]
ClusterFile = Annotated[Path | None, typer.Option(help="a cluster file, instead of --devices")]
Input = Annotated[list[str] | None, typer.Option(help="an input of the batch, such as ids=int64[8,2048]; repeatable")]
Batch = Annotated[int | None, typer.Option(help="global batch size (hf: targets)")]
Seq = Annotated[int | None, typer.Option(help="sequence length (hf: targets)")]
MemoryLimit = Annotated[str | None, typer.Option(help='limit per device, such as "20 GiB"; or a comma-separated list')]
Pin = Annotated[list[str] | None, typer.Option(help='GLOB=STAGE, such as "*.layers.0.*=0"; repeatable')]
Degree = Annotated[int | None, typer.Option(help="force this degree")]
Microbatches = Annotated[int | None, typer.Option(help="force this number of microbatches")]
BatchNorm = Annotated[str, typer.Option(help="statistics of batch normalisation: global, or of each replica")]
Zero = Annotated[str, typer.Option(help="split what replicas store: 0 nothing, 1 optimizer, 2 gradients, 3 all, auto")]
Objective = Annotated[str, typer.Option(help="train, or infer: a forward pass alone, weights alone in memory")]
Solver = Annotated[str, typer.Option(help="highs or cbc")]
TimeLimit = Annotated[float, typer.Option(help="seconds for the solver")]
Gap = Annotated[float, typer.Option(help="relative gap at which the solver may stop")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="write the plan to this file")]
WhatIfs = Annotated[
    list[str] | None,
    typer.Option(help="also plan with one setting changed: devices=8,16 batch=64 memory=40GiB links=0.5,2; repeatable"),
]
Html = Annotated[Path | None, typer.Option(help="write the report as one HTML file")]
TraceFile = Annotated[Path | None, typer.Option(help="write the timeline as a Chrome trace")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="print nothing but errors and --json")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="progress on stderr")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep measurements on disk")]


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
    job = _job(locals(), progress=sys.stderr.isatty() and not quiet)
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
    html: Html = None,
    trace: TraceFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train for a few steps on the factory's batch, or on random inputs; print losses, predicted and measured time."""
    from shardplan import cli_work

    job = _job(locals())
    found = cli_work.train(job, plan, steps, lr, seed, quiet or json)
    if found is None:  # a rank other than the first
        return
    from shardplan.planner import report

    for path in filter(None, (html, trace)):
        _write(report.render_html if path is html else report.render_trace, found.plan, path, found.measured)
    if json:
        print(found.to_json())


app.command("simulate")(simulate_command)
app.command("profile")(profile_command)


@app.command("check")
def check_command(
    target: Target,
    devices: Devices = "2",
    input: Input = None,
    batch: Batch = None,
    seq: Seq = None,
    memory: MemoryLimit = None,
    pin: Pin = None,
    dp: Degree = None,
    tp: Degree = None,
    pp: Degree = None,
    microbatches: Microbatches = None,
    plan: Annotated[Path | None, typer.Option(help="check this plan file instead of planning")] = None,
    tolerance: Annotated[float | None, typer.Option(help="relative error that is allowed; default: measured")] = None,
    seed: Annotated[int, typer.Option(help="of weights, random inputs and dropout")] = 0,
    solver: Solver = "highs",
    time_limit: TimeLimit = 60.0,
    gap: Gap = 0.01,
    cache: Cache = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the plan and the model on one device on the same batch; compare loss, gradients, buffers and outputs.

    Exit status 7 where they differ; the first op at fault is named.
    """
    from shardplan import cli_work

    job = _job(locals())
    found = cli_work.check(job, plan, tolerance, seed)
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


def _job(flags: dict[str, Any], progress: bool = False) -> Any:
    """The `cli_work.Job` of a command's parameters, by name. progress: show it unasked."""
    from shardplan import cli_work

    return cli_work.Job(
        target=flags["target"],
        devices=str(flags.get("cluster") or flags["devices"]),
        inputs=tuple(flags["input"] or ()),
        batch=flags["batch"],
        seq=flags["seq"],
        memory=flags["memory"],
        pins=tuple(flags["pin"] or ()),
        degrees=_degrees(flags["dp"], flags["tp"], flags["pp"]),
        microbatches=flags["microbatches"],
        batch_norm=flags.get("batch_norm", "global"),
        zero=flags.get("zero", "auto"),
        objective=flags.get("objective", "train"),
        solver=flags["solver"],
        time_limit=flags["time_limit"],
        gap=flags["gap"],
        cache=flags["cache"],
        verbose=flags["verbose"] or progress,
    )


def _degrees(dp: int | None, tp: int | None, pp: int | None) -> dict[str, int]:
    return {name: value for name, value in (("dp", dp), ("tp", tp), ("pp", pp)) if value is not None}


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
        _save(plan, output)
    if html:
        _write(lambda plan, measured: report.render_html(plan, measured, what_if), plan, html)
    if trace:
        _write(report.render_trace, plan, trace)
    if json:
        print(report.render_json(plan, None, what_if).rstrip())
    elif not quiet:
        report.print_report(plan, None, what_if)


def _save(plan: Any, path: Path) -> None:
    _write(lambda plan, _: plan.to_json(), plan, path)


def _write(render: Any, plan: Any, path: Path, measured: Any = None) -> None:
    from shardplan.errors import UsageError
    from shardplan.planner.plan import write_atomically

    text = render(plan, measured)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}", [str(error)]) from error
