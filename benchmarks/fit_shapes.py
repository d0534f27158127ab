"""The shape curves of the analytic model against published operator timings.

    python benchmarks/fit_shapes.py gemm_attention_efficiency.jsonl gpt_operator_times.jsonl

For every GPU the sizes at which matrix products reach half of their speed (half_m, half_n, half_k of
`planner.analytic.constants.Architecture`), by search over a grid, with the mean error of the curve beside that of a
constant; what grouped products reach of plain ones; then whole transformer layers: predicted forward over the sum of
the measured operators, by GPU and tensor-parallel degree. The A100's published backward leaves out gradients of
weights, so only forwards are compared.

Files: one JSON object a line; products have "gpu", "op", "m", "n", "k", "efficiency"; operators "gpu", "model", "op",
"fwd_us", "hidden", "heads", "seq", "micro_batch", "tp", "gemm_MNK".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from shardplan.planner.analytic import read_row
from shardplan.planner.analytic.constants import DEFAULT
from shardplan.planner.analytic.layer import layer_seconds
from shardplan.planner.analytic.links import network
from shardplan.planner.analytic.ops import Chip

HALVES = (0, 30, 60, 120, 200, 300)
# Operators whose forward holds no all-reduce.
COLUMN_SPLIT = ("enc-attention-qkv", "enc-MLP-GEMM-1")
DEVICES = {"A100-SXM4-40GB": "a100-40g", "V100-32GB": "v100-32g"}
PEAK_FLOPS = {"A100-SXM4-40GB": 312e12, "V100-32GB": 125e12}

Product = tuple[int, int, int, float]
"""m, n, k, share of the peak."""


def products(
    efficiencies: Iterable[Mapping[str, Any]], operators: Iterable[Mapping[str, Any]]
) -> dict[str, list[Product]]:
    """Measured products by GPU."""
    found: dict[str, list[Product]] = defaultdict(list)
    for row in efficiencies:
        if row["op"] == "matmul" and row["batch"] == 1:
            found[row["gpu"]].append((row["m"], row["n"], row["k"], row["efficiency"]))
    for row in operators:
        if row.get("gemm_MNK") and (row["op"] in COLUMN_SPLIT or row["tp"] == 1):
            m, n, k = row["gemm_MNK"]
            share = 2 * m * n * k / (row["fwd_us"] * 1e-6) / PEAK_FLOPS[row["gpu"]]
            found[row["gpu"]].append((m, n, k, share))
    return found


def fit(measured: Sequence[Product]) -> tuple[float, float, tuple[int, int, int]]:
    """(mean log error, share of the peak at full size, half sizes) of the best curve."""

    def tried(halves: tuple[int, int, int]) -> tuple[float, float, tuple[int, int, int]]:
        curve = [1 / (1 + sum(half / size for half, size in zip(halves, row))) for row in measured]
        full = statistics.median(row[3] / value for row, value in zip(measured, curve))
        errors = [abs(math.log(full * value / row[3])) for row, value in zip(measured, curve)]
        return statistics.fmean(errors), full, halves

    return min(tried((a, b, c)) for a, b, c in product(HALVES, repeat=3))


def layers(operators: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Predicted over measured forward of a GPT layer, by (GPU, tensor-parallel degree)."""
    sums: dict[tuple[Any, ...], float] = defaultdict(float)
    for row in operators:
        if row["algo"] == 0 and row["op"].startswith("enc-"):
            key = tuple(row[name] for name in ("gpu", "hidden", "heads", "seq", "micro_batch", "tp"))
            sums[key] += row["fwd_us"] * 1e-6
    ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (gpu, hidden, heads, seq, micro_batch, tp), seconds in sums.items():
        row = read_row({
            "family": "gpt", "layers": 1, "hidden": hidden, "heads": heads, "vocab": 51200, "seq_len": seq,
            "devices": f"8x{DEVICES[gpu]}", "tp": tp, "dp": 1, "micro_batch": micro_batch, "precision": "fp16",
            "flash_attention": False,
        })  # fmt: skip
        net, _ = network(row, None)
        assert row.shape is not None
        chip = Chip.of_kind(net.kinds(0)[0], row.precision, row.zero, DEFAULT)
        ratios[gpu, tp].append(layer_seconds(row, row.shape, chip, net, 0).forward / seconds)
    return ratios


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("efficiencies", type=Path)
    parser.add_argument("operators", type=Path)
    options = parser.parse_args()
    efficiencies, operators = read(options.efficiencies), read(options.operators)
    for gpu, measured in products(efficiencies, operators).items():
        error, full, halves = fit(measured)
        middle = statistics.median(row[3] for row in measured)
        constant = statistics.fmean(abs(math.log(middle / row[3])) for row in measured)
        curve = f"{full:.2f} of the peak, half at {halves}; {error:.1%} off ({constant:.1%} as a constant)"
        print(f"{gpu:16} {len(measured):4} products: {curve}")
    for gpu in sorted({row["gpu"] for row in efficiencies}):
        share = {op: statistics.median(r["efficiency"] for r in efficiencies if (r["gpu"], r["op"]) == (gpu, op))
                 for op in ("matmul", "group_matmul")}  # fmt: skip
        print(f"{gpu:16} grouped products reach {share['group_matmul'] / share['matmul']:.2f} of plain ones")
    for (gpu, tp), ratios in sorted(layers(operators).items()):
        print(f"{gpu:16} tp {tp}: layer forward predicted / measured {statistics.median(ratios):.2f}, "
              f"{min(ratios):.2f} to {max(ratios):.2f} of {len(ratios)}")  # fmt: skip


if __name__ == "__main__":
    main()
