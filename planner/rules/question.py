"""An op as a node calls it, as plain data that another process can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardplan.planner.rules.localize import Slot
from shardplan.planner.trace import TensorInfo, info, is_tensor, needs_grad, tensor_args

_CONSTANTS = (bool, int, float, complex, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)


@dataclass(frozen=True, slots=True)
class Question:
    """How may this op be split?

    op: qualified name with overload, ``"mylib::router.default"``. schema: of the op, as text.
    args / kwargs: the node's, tensors replaced by `Slot`. tensors: what the slots hold, sizes as they stand here.
    """

    op: str
    schema: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def key(self) -> str:
        """What an answer depends on, apart from how the op is implemented. Sizes count by how they are related: which
        are one, and which are equal to one another or to a constant."""
        return repr((self.schema, self.args, self.kwargs, [(t.shape, t.dtype, t.needs_grad) for t in self.tensors]))


def ask(node: fx.Node) -> Question | None:
    """The question for a node, or None where an argument is not plain data."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    arguments = tensor_args(node)
    if not arguments or not all(is_tensor(a) for a in arguments):
        return None
    places = iter(range(len(arguments)))
    try:
        args = tuple(_plain(a, places) for a in node.args)
        kwargs = tuple((k, _plain(v, places)) for k, v in node.kwargs.items())
        tensors = tuple(TensorInfo(info(a).shape, info(a).dtype, needs_grad(node) and needs_grad(a)) for a in arguments)
    except TypeError:
        return None
    return Question(
        f"{target.namespace}::{target._opname}.{target._overloadname}", str(target._schema), args, kwargs, tensors
    )


def _plain(value: Any, places: Any) -> Any:
    """Raises TypeError on what is not plain data."""
    if isinstance(value, fx.Node):
        return Slot(next(places))
    if isinstance(value, (list, tuple)):
        return [_plain(item, places) for item in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, _CONSTANTS):
        return value
    raise TypeError(f"{type(value).__name__} is not plain data")


def target_of(question: Question) -> Any:
    """The op of that name in this process. Raises AttributeError where it is not registered."""
    namespace, _, rest = question.op.partition("::")
    name, _, overload = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def fill(target: Callable[..., Any], question: Question, values: Sequence[torch.Tensor]) -> Any:
    """Call the op with these tensors in the slots."""

    def value_of(item: Any) -> Any:
        if isinstance(item, Slot):
            return values[item.index]
        return [value_of(i) for i in item] if isinstance(item, list) else item

    return target(*map(value_of, question.args), **{k: value_of(v) for k, v in question.kwargs})
