"""What `benchmarks.gpu` runs: models from configurations, batches, and the clusters whose stages it tries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import shardplan as sp
from shardplan import configs
from shardplan.api import plan_traced
from shardplan.batch import Batch, example_batch
from shardplan.planner.plan import Plan
from shardplan.planner.trace import Trace
from shardplan.planning import Request, make_trace, resolve_cluster, say_nothing
from shardplan.rewrite import compile as compile_program
from shardplan.rewrite.program import Program
from shardplan.targets import Target, load_target

_RESNET_50 = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "num_labels": 1000,
    "dtype": "bfloat16",
}


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


@dataclass(frozen=True, slots=True)
class Job:
    """config: name of a shipped configuration, or one; changes: of its entries. small: changes with which a CPU runs it
    in a second, to try the suite. compiled: whether torch.compile is timed as well."""

    name: str
    config: str | dict[str, Any]
    batch: int
    seq: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False


_GPT_SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": 64}
_LLAMA_SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
_VIT_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_RESNET_SMALL = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}

SINGLE = (
    Job("GPT-2 124M", "gpt2", 16, 1024, {"dtype": "bfloat16"}, _GPT_SMALL, compiled=True),
    Job("GPT-2 355M", "gpt2-medium", 8, 1024, {"dtype": "bfloat16"}, _GPT_SMALL),
    Job("GPT-2 774M", "gpt2-large", 8, 1024, {"dtype": "bfloat16"}, _GPT_SMALL),
    Job("GPT-2 1.5B", "gpt2-xl", 4, 1024, {"dtype": "bfloat16"}, _GPT_SMALL),
    Job("Llama 1B", "llama-3.2-1b", 4, 2048, {}, _LLAMA_SMALL, compiled=True),
    Job("Llama 8B, 6 layers", "llama-3-8b", 2, 4096, {"num_hidden_layers": 6}, _LLAMA_SMALL),
    Job("ViT-L", "vit-large", 64, None, {"dtype": "bfloat16"}, {**_VIT_SMALL, "image_size": 32}, compiled=True),
    Job("ResNet-50", _RESNET_50, 128, None, {}, {**_RESNET_SMALL, "image_size": 32}, compiled=True),
    Job(
        "mixture of 8 experts",
        "mixtral-8x7b",
        4,
        2048,
        {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
         "num_key_value_heads": 2},
        {**_LLAMA_SMALL, "num_local_experts": 4},
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Staged:
    """A model on a described cluster, of which the stages are run one at a time. devices: how many; degrees: of the
    plan."""

    job: Job
    devices: int
    degrees: dict[str, int]
    microbatches: int


STAGED = (
    Staged(Job("Mistral 7B", "mistral-7b", 8, 4096, {}, _LLAMA_SMALL), 4, {"pp": 4, "dp": 1, "tp": 1}, 8),
    Staged(Job("Llama 8B", "llama-3-8b", 8, 4096, {}, _LLAMA_SMALL), 4, {"pp": 2, "dp": 1, "tp": 2}, 4),
    Staged(Job("Qwen 32B", "qwen2.5-32b", 8, 4096, {}, _LLAMA_SMALL), 16, {"pp": 4, "dp": 1, "tp": 4}, 8),
    Staged(Job("Llama 70B", "llama-3-70b", 8, 4096, {}, _LLAMA_SMALL), 32, {"pp": 4, "dp": 1, "tp": 8}, 8),
)


def target_of(job: Job, small: bool, on_meta: bool) -> Target:
    config = job.config if isinstance(job.config, dict) else json.loads(configs.file_of(job.config).read_text())
    config = {**config, **job.changes, **(job.small if small else {})}
    if small:
        config["dtype"] = "float32"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(config))
        seq = job.seq if not small or job.seq is None else 32
        return load_target(f"hf:{path}", batch=job.batch if not small else min(job.batch, 8), seq=seq, on_meta=on_meta)


@dataclass(frozen=True, slots=True)
class Planned:
    trace: Trace
    plan: Plan
    program: Program
    batch: dict[str, torch.Tensor]


def planned(
    target: Target,
    devices: Any,
    precision: str | None = None,
    microbatches: int | str = "auto",
    constraints: tuple[Any, ...] = (),
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
) -> Planned:
    """Trace, plan and compile a target; its batch has random data on the CPU."""
    request = Request(
        target.loss_fn, optimizer, constraints, precision, microbatches, rematerialize=False, zero=0, schedule="auto"
    )
    data = example_batch(target.model, target.random_batch(0), target.loss_fn is not None)
    trace, inputs = make_trace(target.model, data.on_meta(), request)
    plan = plan_traced(trace, resolve_cluster(devices, request), request, say_nothing)
    bound = inputs.bind(Batch(data.args, data.kwargs, data.target))
    return Planned(trace, plan, compile_program(trace, plan, "train"), bound)


def degrees(held: Staged) -> tuple[Any, ...]:
    return (sp.degrees(**held.degrees),)
