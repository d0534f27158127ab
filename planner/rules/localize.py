"""The op as one rank runs it: local shapes, localised size arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from shardplan.planner.placement import Mesh
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import TensorInfo


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands in `LocalCall.args` for the tensor argument of that index (order of `planner.trace.tensor_args`)."""

    index: int


@dataclass(frozen=True, slots=True)
class LocalCall:
    """A node's call on one rank.

    args / kwargs: the node's, tensors replaced by `Slot`, sizes (view, expand, full, arange, slice ends, ...) local.
    inputs / outputs: local TensorInfo of the slots and of the tensor results.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def local_call(node: fx.Node, chosen: Mapping[str, Strategy], mesh: Mesh) -> LocalCall:
    """The call of `node` when axis `a` of `mesh` runs it by ``chosen[a]`` (an axis not named: replicated).

    Raises ValueError where a shard does not divide.
    """
    raise NotImplementedError
