"""Trace, and plan for, Llama 3 models on the meta device: seconds by phase (of the processor), nodes, peak memory.

    python benchmarks/tracing.py [8b 70b 405b] [--seq 8192] [--batch 8] [--plan 64xh100] [--profile]

Every model is a process of its own. Exits with 7 where a trace takes 60 s (of the
processor, so that other load does not count) or 4 GiB and more. --plan: also plan for
these devices (batch 512). --profile: where the time of the trace goes, by function. Needs the package transformers.

Shapes: "The Llama 3 Herd of Models", arXiv 2407.21783, table 3; key-value heads and vocabulary likewise. The head
dimension is 128 and embeddings are not tied, as in the released models.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from shardplan.planner import export
from shardplan.planner.trace import Trace
from shardplan.runtime.meta import meta_model

LIMIT_SECONDS = 60.0
LIMIT_NBYTES = 4 << 30
PHASES = ("_capture", "_draft", "normalize", "_finish", "fill_segments")


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int = 8
    vocabulary: int = 128256


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32),
    "70b": Shape(80, 8192, 28672, 64),
    "405b": Shape(126, 16384, 53248, 128),
}


def build(shape: Shape, seq: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=seq,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).bfloat16()


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Count the processor time in the phases of `trace_model`."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - started

        return run

    before = {name: getattr(export, name) for name in PHASES}
    for name, function in before.items():
        setattr(export, name, counting(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(export, name, function)


def peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, seq: int, batch: int, devices: str | None, profiled: bool) -> dict[str, Any]:
    """Runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Imported before the clock starts: transformers loads the model's code on first use.
    import transformers.models.llama.modeling_llama  # noqa: F401

    found: dict[str, Any] = {"imports_nbytes": peak_nbytes()}
    started = time.perf_counter()
    model = meta_model(lambda: build(SHAPES[name], seq))
    model.train()
    found["build"] = time.perf_counter() - started
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    phases: dict[str, float] = {}
    profiler = cProfile.Profile()
    if profiled:
        profiler.enable()
    started, began = time.perf_counter(), time.process_time()
    with timed(phases):
        trace = trace_of(model, batch, seq)
    found["trace"], found["cpu"] = time.perf_counter() - started, time.process_time() - began
    if profiled:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    found |= {"phases": phases, "nodes": len(trace.graph.nodes), "segments": len(trace.segments)}
    found["kinds"] = len({segment.kind for segment in trace.segments})
    found["trace_nbytes"] = peak_nbytes()
    if devices is not None:
        import shardplan

        ids = torch.empty((512, seq), dtype=torch.int64, device="meta")
        started = time.perf_counter()
        plan = shardplan.plan(
            model, devices, {"input_ids": ids, "labels": ids}, optimizer=torch.optim.AdamW, cache=False
        )
        found["plan"] = time.perf_counter() - started
        found["degrees"] = f"{plan.degrees()}, gap {plan.status.gap:.1%}" if plan.status.gap is not None else ""
        found["plan_nbytes"] = peak_nbytes()
    return found


def trace_of(model: nn.Module, batch: int, seq: int) -> Trace:
    ids = torch.empty((batch, seq), dtype=torch.int64, device="meta")
    return export.trace_model(model, (), {"input_ids": ids, "labels": ids})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES))
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--plan", metavar="DEVICES")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.models) - set(SHAPES):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if given.in_process:
        print(json.dumps(measure(given.models[0], given.seq, given.batch, given.plan, given.profile)))
        return 0
    table = Table(title=f"Llama 3 on the meta device, batch {given.batch}, sequence {given.seq}")
    for column in (
        "model",
        "parameters",
        "nodes",
        "build s",
        "trace s",
        "CPU s",
        *(p.strip("_") for p in PHASES),
        "peak GiB",
    ):
        table.add_column(column, justify="right")
    if given.plan:
        table.add_column(f"plan {given.plan} s", justify="right")
        table.add_column("peak GiB", justify="right")
        table.add_column("plan", justify="left")
    bad = False
    for name in given.models:
        command = [sys.executable, __file__, name, "--in-process", "--seq", str(given.seq), "--batch", str(given.batch)]
        command += ["--plan", given.plan] if given.plan else []
        command += ["--profile"] if given.profile else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        bad |= found["cpu"] >= LIMIT_SECONDS or found["trace_nbytes"] >= LIMIT_NBYTES
        row = [name, f"{found['parameters'] / 1e9:.1f} G", str(found["nodes"])]
        row += [
            f"{found['build']:.1f}",
            f"{found['trace']:.1f}",
            f"{found['cpu']:.1f}",
            *(f"{found['phases'][p]:.1f}" for p in PHASES),
        ]
        row.append(f"{found['trace_nbytes'] / 2**30:.2f}")
        if given.plan:
            row += [f"{found['plan']:.1f}", f"{found['plan_nbytes'] / 2**30:.2f}", found["degrees"]]
        table.add_row(*row)
    Console(width=160).print(table)
    return 7 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
