"""Scaling on paper: the best arrangement by the analytic simulator from 8 to 16,384 devices, strong and weak.

    python -m benchmarks.scaling [--model llama-70b ...] [-o FILE]

Strong: one global batch for every number of devices. Weak: the batch grows with the devices. For every number the best
of all arrangements that fit is taken (tensor parallel within a node, pipelines and chunks of layers, ZeRO 1 or 3,
recomputation, sequences per microbatch), as `shardplan simulate` predicts it. Assumptions are printed, and kept with
the figures; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import records
from shardplan.errors import ShardplanError
from shardplan.planner.analytic import predict_row
from shardplan.planner.cluster import Cluster

NODE = "dgx-h100"
SEQ = 8192
PER_DEVICE = 0.25
"""Sequences per device and step of weak scaling."""
_TENSOR = (1, 2, 4, 8)
_PIPELINE = (1, 2, 4, 8, 16)
_MOST_MICROBATCHES = 512


@dataclass(frozen=True, slots=True)
class Model:
    """A published shape; batch: sequences a step of strong scaling, counts: numbers of devices."""

    fields: dict[str, Any]
    batch: int
    counts: tuple[int, ...]


MODELS = {
    "llama-8b": Model(
        dict(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256), 512, (8, 32, 128, 512, 2048)
    ),
    "llama-70b": Model(
        dict(layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=128256), 2048, (64, 256, 1024, 4096, 16384)
    ),
    "llama-405b": Model(
        dict(layers=126, hidden=16384, heads=128, kv_heads=8, ffn=53248, vocab=128256), 2048, (512, 2048, 8192, 16384)
    ),
}


def arrangements(model: Model, devices: int, batch: int) -> Iterator[dict[str, Any]]:
    """Rows for the simulator, those that make no sense left out."""
    layers = model.fields["layers"]
    for tp in _TENSOR:
        for pp in _PIPELINE:
            if devices % (tp * pp) or pp > layers:
                continue
            dp = devices // tp // pp
            for micro_batch in (1, 2):
                count = batch // dp // micro_batch
                if batch % (dp * micro_batch) or not 1 <= count <= _MOST_MICROBATCHES or count < pp:
                    continue
                chunks = [1, *(c for c in (2, 5) if pp > 1 and layers // pp >= c and count % pp == 0)]
                for interleave, recompute, zero in (
                    (c, r, z) for c in chunks for r in ("none", "full") for z in ((1, 3) if pp == 1 else (1,))
                ):
                    more = {"interleave": interleave} if interleave > 1 else {}
                    yield {
                        "family": "llama", **model.fields, "seq_len": SEQ, "devices": f"{NODE}:{devices // 8}",
                        "tp": tp, "pp": pp, "dp": dp, "micro_batch": micro_batch, "global_batch": batch, "zero": zero,
                        "sequence_parallel": tp > 1, "recompute": recompute, **more,
                    }  # fmt: skip


def best(model: Model, devices: int, batch: int) -> dict[str, Any] | None:
    """The fastest row that fits, with what is predicted of it."""
    found: dict[str, Any] | None = None
    for row in arrangements(model, devices, batch):
        try:
            said = predict_row(row)
        except ShardplanError:
            continue
        if said.get("fits") and (found is None or said["step_seconds"] < found["step_seconds"]):
            found = {
                "devices": devices,
                "batch": batch,
                "step_seconds": said["step_seconds"],
                "tokens_per_second": said["tokens_per_second"],
                "mfu": said["mfu"],
                "bubble": said["bubble_fraction"],
                "plan": ", ".join(f"{name} {row[name]}" for name in ("dp", "tp", "pp", "micro_batch", "zero"))
                + (f", {row['interleave']} chunks" if "interleave" in row else "")
                + (", recomputed" if row["recompute"] == "full" else ""),
            }
    return found


def assumptions() -> list[str]:
    cluster = Cluster.preset(NODE, nodes=2)
    kind = cluster.devices[0].kind
    inside, outside = cluster.link(0, 1), cluster.link(0, 8)
    return [
        f"{NODE}: {kind.name}, {kind.memory_nbytes / 1e9:.0f} GB, {kind.peak_flops('bf16') / 1e12:.0f} TFLOP/s in bf16",
        f"inside a node {inside.bytes_per_s / 1e9:.0f} GB/s per device, {inside.latency_seconds * 1e6:.0f} us; between "
        f"nodes {outside.bytes_per_s / 1e9:.0f} GB/s per {outside.per}, {outside.latency_seconds * 1e6:.0f} us",
        f"sequences of {SEQ} tokens; weak scaling: {PER_DEVICE:g} sequences per device and step",
        "tensor parallelism up to 8, within a node; AdamW, bf16 weights, fp32 state; 1F1B, in chunks where better",
        "constants fitted to published throughputs (docs/simulate.md), of up to some thousand devices: stragglers, "
        "congestion and failures are not modelled",
    ]  # fmt: skip


def curves(model: Model) -> dict[str, list[dict[str, Any]]]:
    strong = [best(model, count, model.batch) for count in model.counts]
    weak = [best(model, count, max(int(count * PER_DEVICE), 1)) for count in model.counts]
    return {"strong": [p for p in strong if p], "weak": [p for p in weak if p]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    console, began = Console(width=150), time.process_time()
    for line in assumptions():
        console.print(f"- {line}")
    found = {name: curves(MODELS[name]) for name in given.model}
    for name, parts in found.items():
        for kind, points in parts.items():
            table = Table(title=f"{name}, {kind} scaling")
            for column in ("devices", "batch", "step s", "tokens/s", "efficiency", "MFU", "plan"):
                table.add_column(column)
            for point in points:
                table.add_row(
                    f"{point['devices']:,}",
                    str(point["batch"]),
                    f"{point['step_seconds']:.2f}",
                    f"{point['tokens_per_second']:,.0f}",
                    f"{efficiency(points, point):.0%}",
                    f"{point['mfu']:.1%}",
                    point["plan"],
                )
            console.print(table)
    seconds = time.process_time() - began
    figures = {
        f"{name} {kind} at {points[-1]['devices']:,}: s a step": points[-1]["step_seconds"]
        for name, parts in found.items()
        for kind, points in parts.items()
        if points
    }
    kept = {"assumptions": assumptions(), "models": found, "comparable": figures, "cpu_seconds": seconds}
    records.write(given.output, "scaling", **kept)
    return 0


def efficiency(points: list[dict[str, Any]], point: dict[str, Any]) -> float:
    """Tokens per second and device, to those of the fewest devices."""
    first = points[0]
    return point["tokens_per_second"] / point["devices"] / (first["tokens_per_second"] / first["devices"])


if __name__ == "__main__":
    sys.exit(main())
