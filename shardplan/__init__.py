"""shardplan: auto_parallel(model, devices) for PyTorch.

Public names are loaded when they are first used, so that ``import shardplan`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "auto_parallel": "shardplan.api",
    "plan": "shardplan.api",
    "meta_model": "shardplan.runtime.meta",
    "ParallelModel": "shardplan.parallel_model",
    "Plan": "shardplan.planner.plan",
    "Cluster": "shardplan.planner.cluster",
    "pin": "shardplan.planner.constraints",
    "split": "shardplan.planner.constraints",
    "replicate": "shardplan.planner.constraints",
    "together": "shardplan.planner.constraints",
    "leaf": "shardplan.planner.constraints",
    "degrees": "shardplan.planner.constraints",
    "within_node": "shardplan.planner.constraints",
    "memory": "shardplan.planner.constraints",
    "zero": "shardplan.planner.constraints",
    "rule": "shardplan.planner.rules.own",
    "Rows": "shardplan.runtime.inputs",
    "ShardplanError": "shardplan.errors",
}

__all__ = [
    "Cluster",
    "ParallelModel",
    "Plan",
    "Rows",
    "ShardplanError",
    "auto_parallel",
    "degrees",
    "leaf",
    "memory",
    "meta_model",
    "pin",
    "plan",
    "replicate",
    "rule",
    "split",
    "together",
    "within_node",
    "zero",
]

if TYPE_CHECKING:
    from shardplan.api import auto_parallel, plan
    from shardplan.errors import ShardplanError
    from shardplan.parallel_model import ParallelModel
    from shardplan.planner.cluster import Cluster
    from shardplan.planner.constraints import degrees, leaf, memory, pin, replicate, split, together, within_node, zero
    from shardplan.planner.plan import Plan
    from shardplan.planner.rules.own import rule
    from shardplan.runtime.inputs import Rows
    from shardplan.runtime.meta import meta_model


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'shardplan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
