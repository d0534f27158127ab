"""Values that the graph computes from nothing (positions, masks), without ever holding a large one.

A `Known` keeps the smallest tensor that broadcasts to the value: dims along which the value does not vary have size 1
(a mask of [batch, 1, seq, seq] that is the same for every sample is kept as [1, 1, seq, seq]). A pointwise op whose
result would still be large is kept as a formula that `block` evaluates for some rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardplan.planner.passes.draft import Draft, aten_ops, packet

LARGEST_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Known:
    """shape: of the value. data: broadcasts to it and has as many dims; None for a formula.

    formula: of a pointwise op, (call on tensors, its arguments in order); kept: shape to which it broadcasts.
    """

    shape: tuple[int, ...]
    data: torch.Tensor | None
    formula: tuple[Callable[..., torch.Tensor], tuple[Known, ...]] | None = None
    kept: tuple[int, ...] = ()

    def extents(self) -> tuple[int, ...]:
        """Shape of what is kept: 1 where the value does not vary."""
        return tuple(self.data.shape) if self.data is not None else self.kept

    def full(self) -> torch.Tensor | None:
        """The value as a broadcast view; None for a formula."""
        return None if self.data is None else self.data.expand(self.shape)

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The value at some indices of the last two dims, [..., rows, columns], broadcastable."""
        if self.data is None:
            assert self.formula is not None
            call, arguments = self.formula
            return call(*(argument.block(rows, columns) for argument in arguments))
        data = self.data
        for dim, index in ((-2, rows), (-1, columns)):
            if data.ndim >= -dim and data.shape[dim] > 1:
                data = data.index_select(dim, index)
        return data


def _squeezed(value: torch.Tensor, shape: tuple[int, ...]) -> Known:
    """Keep one slice of every dim along which the value does not vary."""
    for dim in range(value.ndim):
        if value.shape[dim] > 1:
            first = value.narrow(dim, 0, 1)
            if value.stride(dim) == 0 or torch.equal(value, first.expand_as(value)):
                value = first
    return Known(shape, value.contiguous())


class Evaluator:
    """Finds the value of nodes that depend on no placeholder but constants.

    forms: what attention masks turned out to mean, for `fold_masks`.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.found: dict[fx.Node, Known | None] = {}
        self.forms: dict[fx.Node, str | None] = {}

    def __call__(self, node: Any) -> Known | None:
        """The node's value, or None where it is not known or cannot be had cheaply."""
        if not isinstance(node, fx.Node):
            return None
        pending = [node]
        while pending:
            top = pending[-1]
            missing = [n for n in top.all_input_nodes if n not in self.found]
            if top in self.found or not missing:
                pending.pop()
                if top not in self.found:
                    self.found[top] = self._evaluate(top)
            elif any(self.found.get(n, ...) is None for n in top.all_input_nodes):
                self.found[top] = None
            else:
                pending += missing
        return self.found[node]

    def _evaluate(self, node: fx.Node) -> Known | None:
        held = node.meta.get("val")
        if not isinstance(held, torch.Tensor):
            return None
        shape = tuple(held.shape)
        if node.op == "placeholder":
            value = self.draft.constants.get(node)
            small = value is not None and value.device.type != "meta" and value.numel() <= LARGEST_NUMEL
            return _squeezed(value, shape) if small else None  # type: ignore[arg-type]
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        arguments = {n: self.found[n] for n in node.all_input_nodes}
        if any(value is None for value in arguments.values()):
            return None
        try:
            with torch.no_grad():
                return self._call(node, arguments, shape, held.dtype)  # type: ignore[arg-type]
        except (RuntimeError, IndexError, NotImplementedError):
            return None

    def _call(self, node: fx.Node, known: dict[fx.Node, Known], shape: tuple[int, ...], dtype: Any) -> Known | None:
        op, source = packet(node), known.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if op in _FILLS:
            return Known(shape, torch.full((1,) * len(shape), _FILLS[op](node), dtype=dtype))
        if source is not None and op in _COPIES:
            return self._pointwise(lambda x: x.to(dtype), (source,), shape)
        if source is not None and op == "aten.expand":
            return _padded(source, shape)
        if source is not None and op == "aten.unsqueeze":
            dim = int(node.args[1]) % len(shape)  # type: ignore[call-overload]
            if source.data is not None:
                return Known(shape, source.data.unsqueeze(dim))
            # A formula is evaluated by rows and columns: dims of size 1 before these change nothing.
            leading = dim < len(shape) - 2 and all(extent == 1 for extent in source.kept[:-2])
            return Known(shape, None, source.formula, (1, *source.kept)) if leading else None
        if source is not None and source.data is not None and op in ("aten.reshape", "aten.view"):
            return _reshaped(source, shape) or self._whole(node, known, shape)
        if source is not None and source.data is not None and op == "aten.index":
            return self._index(node, known, shape)
        if torch.Tag.pointwise in node.target.tags or op in _ALSO_POINTWISE:  # type: ignore[union-attr]
            tensors = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
            if all(not isinstance(a, (list, tuple)) for a in node.args):
                return self._pointwise(_closed(node, tensors), tuple(known[n] for n in tensors), shape)
        return self._whole(node, known, shape)

    def _pointwise(self, call: Callable[..., Any], values: tuple[Known, ...], shape: tuple[int, ...]) -> Known:
        values = tuple(_padded(value, shape) for value in values)
        extents = torch.broadcast_shapes(*(value.extents() for value in values))
        if math.prod(extents) <= LARGEST_NUMEL and all(value.data is not None for value in values):
            return _squeezed(call(*(value.data for value in values)), shape)
        return Known(shape, None, (call, values), tuple(extents))

    def _index(self, node: fx.Node, known: dict[fx.Node, Known], shape: tuple[int, ...]) -> Known | None:
        """Indexing of the leading dims by tensors; dims along which the source does not vary need no index."""
        indices: Any = node.args[1]
        source = known[node.args[0]].data  # type: ignore[index]
        assert source is not None
        if any(index is None for index in indices) or len(indices) != source.ndim:
            return self._whole(node, known, shape)
        wanted: list[Any] = []
        for dim, index in enumerate(indices):
            data = known[index].data
            if data is None or data.dtype == torch.bool:
                return self._whole(node, known, shape)
            wanted.append(torch.zeros((1,) * data.ndim, dtype=torch.long) if source.shape[dim] == 1 else data)
        value = source[tuple(wanted)]
        return _squeezed(value.reshape((1,) * (len(shape) - value.ndim) + tuple(value.shape)), shape)

    def _whole(self, node: fx.Node, known: dict[fx.Node, Known], shape: tuple[int, ...]) -> Known | None:
        """Any other op: on the whole values, where they are small."""
        if packet(node) in _ALONG:
            return self._along(node, known, shape)
        if math.prod(shape) > LARGEST_NUMEL or any(math.prod(value.shape) > LARGEST_NUMEL for value in known.values()):
            return None
        fulls = {n: value.full() for n, value in known.items()}
        if any(value is None for value in fulls.values()):
            return None
        args, kwargs = map_arg((node.args, _on_cpu(node.kwargs)), lambda n: fulls[n])
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return _squeezed(result, shape) if isinstance(result, torch.Tensor) else None

    def _along(self, node: fx.Node, known: dict[fx.Node, Known], shape: tuple[int, ...]) -> Known | None:
        """Ops along one dim (cumsum, diff, slice, ...): other dims need not be expanded."""
        position = _ALONG[packet(node)]
        if any(value.data is None for value in known.values()):
            return None
        dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", -1)
        dim = int(dim) % len(shape)  # type: ignore[call-overload]
        parts = {}
        for n, value in known.items():
            assert value.data is not None
            extents = list(value.data.shape)
            extents[dim] = value.shape[dim]
            parts[n] = value.data.expand(extents)
        common = torch.broadcast_shapes(
            *[[1 if d == dim else e for d, e in enumerate(p.shape)] for p in parts.values()]
        )
        parts = {n: p.expand([p.shape[d] if d == dim else common[d] for d in range(p.ndim)]) for n, p in parts.items()}
        if any(p.numel() > LARGEST_NUMEL for p in parts.values()):
            return None
        args, kwargs = map_arg((node.args, _on_cpu(node.kwargs)), lambda n: parts[n])
        return _squeezed(node.target(*args, **kwargs), shape)  # type: ignore[operator]


_COPIES = aten_ops("to _to_copy clone contiguous alias detach lift_fresh lift_fresh_copy type_as")
_ALSO_POINTWISE = frozenset({"aten.__and__", "aten.__or__", "aten.__xor__", "aten.masked_fill", "aten.where"})
_ALONG = {"aten.cumsum": 1, "aten.diff": 2, "aten.slice": 1, "aten.flip": 1}
_FILLS: dict[str, Callable[[fx.Node], Any]] = {
    "aten.zeros": lambda node: 0,
    "aten.zeros_like": lambda node: 0,
    "aten.new_zeros": lambda node: 0,
    "aten.ones": lambda node: 1,
    "aten.ones_like": lambda node: 1,
    "aten.new_ones": lambda node: 1,
    "aten.full": lambda node: node.args[1],
    "aten.full_like": lambda node: node.args[1],
    "aten.new_full": lambda node: node.args[2],
    "aten.scalar_tensor": lambda node: node.args[0],
}


def _on_cpu(kwargs: Any) -> dict[str, Any]:
    return {name: torch.device("cpu") if isinstance(value, torch.device) else value for name, value in kwargs.items()}


def _padded(value: Known, shape: tuple[int, ...]) -> Known:
    """The value broadcast to `shape` (leading dims added)."""
    lead = (1,) * (len(shape) - len(value.shape))
    if value.data is not None:
        return Known(shape, value.data.reshape(lead + tuple(value.data.shape)))
    return Known(shape, None, value.formula, lead + value.kept)


def _reshaped(value: Known, shape: tuple[int, ...]) -> Known | None:
    """The value with dims of size 1 put in or taken out; None where the reshape does more."""
    assert value.data is not None
    long = [dim for dim, extent in enumerate(value.shape) if extent > 1]
    if [value.shape[dim] for dim in long] != [extent for extent in shape if extent > 1]:
        return None
    extents = iter([value.data.shape[dim] for dim in long])
    return Known(shape, value.data.reshape([next(extents) if extent > 1 else 1 for extent in shape]))


def _closed(node: fx.Node, tensors: list[fx.Node]) -> Callable[..., torch.Tensor]:
    """The op with everything but its tensor arguments filled in."""

    def call(*values: torch.Tensor) -> torch.Tensor:
        given = iter(values)
        args = [next(given) if isinstance(a, fx.Node) else a for a in node.args]
        kwargs = {k: next(given) if isinstance(a, fx.Node) else a for k, a in _on_cpu(node.kwargs).items()}
        return node.target(*args, **kwargs)  # type: ignore[operator]

    assert all(isinstance(n, fx.Node) for n in tensors)
    return call
