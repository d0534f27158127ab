"""``shardplan simulate``: step time and memory of jobs that are only described, as a table or as lines of JSON."""

from __future__ import annotations

import json as json_form
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shardplan.errors import ShardplanError, UsageError

_Count = Annotated[int | None, typer.Option()]


def simulate_command(
    rows: Annotated[Path | None, typer.Option(help="a file with one JSON object a line; - for stdin")] = None,
    cluster: Annotated[Path | None, typer.Option(help="a cluster file, in place of devices")] = None,
    memory: Annotated[str | None, typer.Option(help='limit per device, such as "20 GiB"')] = None,
    id: Annotated[str | None, typer.Option(help="name of the row")] = None,
    family: Annotated[str | None, typer.Option(help="gpt, llama or moe")] = None,
    layers: _Count = None,
    hidden: _Count = None,
    heads: _Count = None,
    kv_heads: _Count = None,
    ffn: Annotated[int | None, typer.Option(help="width of the MLP; of one expert")] = None,
    vocab: _Count = None,
    seq: Annotated[int | None, typer.Option("--seq", "--seq-len", help="sequence length")] = None,
    experts: _Count = None,
    top_k: _Count = None,
    gated: Annotated[bool | None, typer.Option(help="whether the MLP has a gate")] = None,
    flash_attention: Annotated[bool | None, typer.Option(help="whether attention is one fused kernel")] = None,
    devices: Annotated[str | None, typer.Option(help='"64xa100-80g", "4xh100,4xa10g"')] = None,
    gpus_per_node: _Count = None,
    intra_node_bandwidth: Annotated[str | None, typer.Option(help='per device, one direction: "300 GB/s"')] = None,
    inter_node_bandwidth: Annotated[
        str | None, typer.Option(help='"200 GB/s" per node, or "25 GB/s per device"')
    ] = None,
    tp: Annotated[int | None, typer.Option(help="tensor parallel")] = None,
    pp: Annotated[int | None, typer.Option(help="pipeline parallel")] = None,
    dp: Annotated[int | None, typer.Option(help="data parallel; default: what is left of the devices")] = None,
    cp: Annotated[int | None, typer.Option(help="context parallel")] = None,
    ep: Annotated[int | None, typer.Option(help="expert parallel")] = None,
    interleave: Annotated[int | None, typer.Option(help="chunks per pipeline rank")] = None,
    schedule: Annotated[str | None, typer.Option(help="1f1b, gpipe, interleaved or zb")] = None,
    micro_batch: _Count = None,
    batch: Annotated[int | None, typer.Option("--batch", "--global-batch", help="global batch size")] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3")] = None,
    sequence_parallel: Annotated[bool | None, typer.Option()] = None,
    recompute: Annotated[str | None, typer.Option(help="none, selective or full")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16, fp32 or fp8")] = None,
    layers_per_stage: Annotated[str | None, typer.Option(help="such as 10,11,11,10")] = None,
    stage_seconds: Annotated[
        str | None, typer.Option(help="forward=0.01,backward_input=0.01,backward_weight=0.01,send=0.001")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Predict step time, throughput and memory from a table row: no model, no GPU.

    Rows with mistakes are named on stderr (exit status 2); the others are answered.
    """
    given = {
        "id": id, "family": family, "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads,
        "ffn": ffn, "vocab": vocab, "seq_len": seq, "experts": experts, "top_k": top_k, "gated": gated,
        "flash_attention": flash_attention, "devices": devices, "gpus_per_node": gpus_per_node,
        "intra_node_bandwidth": intra_node_bandwidth, "inter_node_bandwidth": inter_node_bandwidth, "tp": tp,
        "pp": pp, "dp": dp, "cp": cp, "ep": ep, "interleave": interleave, "schedule": schedule,
        "micro_batch": micro_batch, "global_batch": batch, "zero": zero, "sequence_parallel": sequence_parallel,
        "recompute": recompute, "precision": precision, "layers_per_stage": _counts(layers_per_stage),
        "stage_seconds": _named(stage_seconds),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if rows is not None and given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} says what --rows says for every row")
    if rows is None and not given:
        raise UsageError(
            "nothing to simulate", hints=["give --rows FILE.jsonl, or a row: --family llama --layers 80 ..."]
        )
    lines = [("1", given)] if rows is None else list(_read(rows))
    results = list(_predict(lines, cluster, memory))
    if json:
        for result in results:
            print(json_form.dumps(result))
    else:
        _table([result for result in results if "error" not in result])
    wrong = [result for result in results if "error" in result]
    for result in wrong:
        print(f"row {result['id']}: {result['error']}", file=sys.stderr)
    if wrong:
        raise typer.Exit(2)


def _counts(text: str | None) -> list[int] | None:
    """``"10,11"`` -> [10, 11]."""
    if text is None:
        return None
    parts = [part.strip() for part in text.strip("[]").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"cannot read --layers-per-stage {text!r}", hints=["write 10,11,11,10"])
    return [int(part) for part in parts]


def _named(text: str | None) -> dict[str, Any] | None:
    """``"forward=0.01,send=1 ms"`` -> its parts; a bare number is in seconds."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise UsageError(f"cannot read --stage-seconds {text!r}", hints=["write forward=0.01,backward_input=0.02"])
    return {name.strip(): _number(value.strip()) for name, _, value in pairs}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """(name of the row where it has none, the row or the error that stands in its place) of every line."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}", [str(error)]) from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield str(number), json_form.loads(line)
        except ValueError as error:
            yield str(number), UsageError(f"line {number} is not JSON: {error}")


def _predict(lines: Sequence[tuple[str, Any]], cluster: Path | None, memory: str | None) -> Iterator[Mapping[str, Any]]:
    """The prediction of every row, or its id and error."""
    from shardplan.planner.analytic import predict_row
    from shardplan.planner.cluster import Cluster

    given = None if cluster is None else Cluster.load(cluster)
    limit = _limit(memory)
    for name, data in lines:
        try:
            if isinstance(data, UsageError):
                raise data
            yield predict_row(data, given, limit, default_id=name)
        except ShardplanError as error:
            own = data.get("id") if isinstance(data, Mapping) else None
            yield {"id": name if own is None else own, "error": "; ".join((error.title, *error.details, *error.hints))}


def _limit(memory: str | None) -> int | None:
    from shardplan.planner.units import parse_nbytes

    try:
        return None if memory is None else parse_nbytes(memory)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None


def _table(results: Sequence[Mapping[str, Any]]) -> None:
    """Rows for a person: seconds, GiB, per cent."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not results:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("row", overflow="fold")
    for title in ("step s", "tokens/s", "TFLOP/s/dev", "MFU", "bubble", "peak GiB", "fits"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        peaks = result["peak_memory_bytes"]
        table.add_row(
            Text(str(result["id"])),
            f"{result['step_seconds']:.4g}",
            _or_dash(result["tokens_per_second"], "{:,.0f}"),
            _or_dash(result["tflops_per_device"], "{:.1f}"),
            _or_dash(result["mfu"], "{:.1%}"),
            f"{result['bubble_fraction']:.1%}",
            _or_dash(None if peaks is None else max(peaks) / 2**30, "{:.1f}"),
            "-" if result["fits"] is None else "yes" if result["fits"] else "no",
        )
    Console().print(table)
    for note in sorted({f"row {r['id']}: {note}" for r in results for note in r.get("notes", ())}):
        print(note, file=sys.stderr)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
