"""Measure a grid of ops on this machine's GPU and write the profile that the package ships for its kind.

    make profile-gpu                                             # kind by the device's name, about eight minutes
    PYTHONPATH=. python benchmarks/profile_gpu.py --kind h100    # under a preset's name
    PYTHONPATH=. python benchmarks/profile_gpu.py --device cpu --tiny --kind cpu -o profile_cpu.toml

Matrix products in bf16, fp16 and fp32, attention over heads and sequences, normalisations, pointwise ops and
embeddings, forward and backward. Needs no network. What does not fit into memory or the budget is left out.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs import profile, shipped
from shardplan.planner.costs.roofline import modelled_seconds
from shardplan.planner.costs.store import Sample
from shardplan.planner.presets import preset_kinds
from shardplan.planner.rules.localize import LocalCall, Slot
from shardplan.planner.trace import TensorInfo

aten = torch.ops.aten
_HIDDEN = (1024, 2048, 4096, 8192)
_ROWS = (512, 2048, 8192, 32768)


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kind = arguments.kind or kind_of(name)
    started = time.monotonic()
    described = preset_kinds().get(kind) or Cluster.parse(str(device)).devices[0].kind
    found: list[Sample] = []
    for call in grid(arguments.tiny):
        if time.monotonic() - started > arguments.budget:
            print("the budget is spent; the rest of the grid is left out")
            break
        taken = profile.measure(call, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if taken is not None and taken.forward_seconds > 0:
            keys = profile.call_key(call), profile.family_key(call)
            found.append(profile.sample_of(taken, *keys, modelled_seconds(call, described)))
    versions = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    path = Path(arguments.output or f"planner/{shipped.PREFIX}{kind}.toml")
    path.write_text(shipped.text(kind, versions, found))
    print(f"{len(found)} ops in {time.monotonic() - started:.0f} s: {path}")


def kind_of(name: str) -> str:
    """The preset that a device's name means. Raises SystemExit where none does."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    fits = [kind for kind in preset_kinds() if set(kind.split("-")) <= words]
    if not fits:
        raise SystemExit(
            f"no preset is called like {name!r}; name one with --kind: {', '.join(sorted(preset_kinds()))}"
        )
    return max(fits, key=len)


def grid(tiny: bool = False) -> Iterator[LocalCall]:
    """The ops, those first that matter most."""
    hidden, rows = ((32,), (16, 64)) if tiny else (_HIDDEN, _ROWS)
    halves = (torch.bfloat16, torch.float16, torch.float32)
    for dtype in halves[:1] if tiny else halves:
        for width in hidden:
            for count in rows:
                for out in (width, 4 * width):
                    yield _call(aten.linear.default, [(count, width), (out, width)], (count, out), dtype)
                yield _call(aten.linear.default, [(count, 4 * width), (width, 4 * width)], (count, width), dtype)
    dtype = halves[0]
    for heads, length in ((4, 16),) if tiny else ((16, 1024), (32, 2048), (32, 4096), (64, 8192)):
        shape = (1, heads, length, 16 if tiny else 128)
        yield _call(aten.scaled_dot_product_attention.default, [shape] * 3, shape, dtype, None, 0.0, True)
    for width in hidden:
        for count in rows:
            shape = (1, count, width)
            yield _call(aten.layer_norm.default, [shape], shape, dtype, [width])
            for target in (aten.add.Tensor, aten.mul.Tensor):
                yield _call(target, [shape, shape], shape, dtype)
            for target in (aten.gelu.default, aten.silu.default):
                yield _call(target, [shape], shape, dtype)
            ids = TensorInfo((1, count), torch.int64)
            table = TensorInfo((64 if tiny else 32000, width), dtype, True)
            result = TensorInfo(shape, dtype, True)
            yield LocalCall(aten.embedding.default, (Slot(0), Slot(1)), {}, (table, ids), (result,))


def _call(
    target: torch._ops.OpOverload,
    shapes: list[tuple[int, ...]],
    out: tuple[int, ...],
    dtype: torch.dtype,
    *rest: object,
) -> LocalCall:
    inputs = tuple(TensorInfo(shape, dtype, True) for shape in shapes)
    slots = tuple(Slot(index) for index in range(len(shapes)))
    return LocalCall(target, (*slots, *rest), {}, inputs, (TensorInfo(out, dtype, True),))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kind", help="name of the preset; default: by the device's name")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds")
    parser.add_argument("--tiny", action="store_true", help="a grid of seconds, to try the script")
    parser.add_argument("-o", "--output")
    return parser.parse_args()


if __name__ == "__main__":
    main()
