"""What commands have in common: flags, the job that they describe, the files they ask for. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


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


def job_of(flags: dict[str, Any], progress: bool = False) -> Any:
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


def write(path: Path, text: str) -> None:
    """The file is whole or untouched. Raises UsageError."""
    from shardplan.errors import UsageError
    from shardplan.planner.plan import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}", [str(error)]) from error
