"""How well modelled matrix products match published timings, and the fit of the model's efficiencies to them.

    python benchmarks/fit_ops.py gemm.jsonl          # errors of the shipped constants, by GPU and result type
    python benchmarks/fit_ops.py gemm.jsonl --fit    # the efficiency that fits each GPU best, alone

The file has one JSON object a line: "gpu", "op" ("matmul"; others are left out), "batch", "m", "k", "n", "out_dtype",
"peak_tflops", "time_us".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from typing import Any
from unittest import mock

import torch

from shardplan.planner.cluster import DeviceKind
from shardplan.planner.costs import roofline
from shardplan.planner.rules.localize import LocalCall, Slot
from shardplan.planner.trace import TensorInfo

_MEMORY_BYTES_PER_S = {"A100-PCIe-80GB": 1.935e12, "B200-SXM": 8e12}
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with open(arguments.file) as file:
        for row in map(json.loads, file):
            if row["op"] == "matmul" and row["gpu"] in _MEMORY_BYTES_PER_S:
                groups[row["gpu"] if arguments.fit else f"{row['gpu']} -> {row['out_dtype']}"].append(row)
    for name, rows in sorted(groups.items()):
        if not arguments.fit:
            print(f"{name:24s} {len(rows):4d} products  {_text(_errors(rows))}")
            continue
        peak = rows[0]["peak_tflops"] * 1e12
        candidates = {share / 200: _errors(rows, share / 200) for share in range(60, 180)}
        best = min(candidates, key=lambda share: statistics.mean(map(abs, candidates[share])))
        print(f"{name:24s} best {best:.3f}, shipped {roofline.efficiency(peak, 'cuda'):.3f}  {_text(candidates[best])}")


def _errors(rows: list[dict[str, Any]], share: float | None = None) -> list[float]:
    """Logarithm of modelled over published seconds; share: an efficiency in place of the shipped one."""
    replaced = roofline.efficiency if share is None else lambda peak, device: share
    with mock.patch.object(roofline, "efficiency", replaced):
        return [_error(row) for row in rows]


def _error(row: dict[str, Any]) -> float:
    kind = DeviceKind(row["gpu"], "cuda", 1 << 36, _MEMORY_BYTES_PER_S[row["gpu"]], {"bf16": row["peak_tflops"] * 1e12})
    batch = (row["batch"],) if row["batch"] > 1 else ()
    left = TensorInfo((*batch, row["m"], row["k"]), torch.bfloat16)
    right = TensorInfo((*batch, row["k"], row["n"]), torch.bfloat16)
    result = TensorInfo((*batch, row["m"], row["n"]), _TYPES[row["out_dtype"]])
    target = torch.ops.aten.bmm.default if batch else torch.ops.aten.mm.default
    forward, _ = roofline.modelled_seconds(LocalCall(target, (Slot(0), Slot(1)), {}, (left, right), (result,)), kind)
    return math.log(forward / (row["time_us"] * 1e-6))


def _text(errors: list[float]) -> str:
    absolute = sorted(map(abs, errors))
    return (
        f"mean error {statistics.mean(absolute):.1%}, worst tenth above {absolute[int(0.9 * len(absolute))]:.1%}, "
        f"bias {statistics.median(errors):+.1%}"
    )


if __name__ == "__main__":
    main()
