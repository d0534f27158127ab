"""Rows selected by a mask, ``x[mask]``, whose number depends on data: where only sums, means and losses read what is
computed of them, the same is computed of all rows, and those that are not selected count nothing.

Exact: the rows that are left out are set to zero before anything reads them, and only ops that have finite values and
derivatives of what is finite are followed, so that no infinity or NaN of theirs reaches a gradient.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardplan.planner.passes.draft import Draft, aten_ops, location, packet

name = "selections"

aten = torch.ops.aten

# Of each element by itself.
_POINTWISE = aten_ops(
    "add sub mul neg square abs to _to_copy sigmoid tanh relu gelu silu softplus log_sigmoid exp sin cos clamp eq ne "
    "lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not detach alias clone contiguous"
)
_LAST_DIM = {"aten.softmax": 1, "aten.log_softmax": 1, "aten._softmax": 1, "aten._log_softmax": 1}  # argument "dim"
# Position of the argument "reduction".
_LOSSES = {
    "aten.mse_loss": 2,
    "aten.l1_loss": 2,
    "aten.smooth_l1_loss": 2,
    "aten.huber_loss": 2,
    "aten.binary_cross_entropy": 3,
    "aten.binary_cross_entropy_with_logits": 4,
}
# Positions of "weight" (of a class, not of an element), "reduction" and "ignore_index".
_CLASS_LOSSES = {"aten.cross_entropy_loss": (3, 4), "aten.nll_loss_nd": (3, 4), "aten.nll_loss": (3, 4)}
_IGNORED = -100
_NONE, _MEAN, _SUM = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Selected:
    """rows: all of them, [rows, ...], finite where not selected; left_out: [rows] bool; mask: as the model wrote it."""

    rows: fx.Node
    left_out: fx.Node
    mask: fx.Node


def apply(draft: Draft) -> None:
    found: dict[fx.Node, _Selected] = {}
    for node in draft.ops():
        made = _selection(draft, node) or _broadcast(draft, node, found) or _followed(draft, node, found)
        if made is not None:
            found[node] = made
            continue
        total = _total(draft, node, found)
        if total is not None:
            place, text = location(node)
            draft.note(f"{place}: {text}: computed of all rows, with zeros for those that the mask leaves out")
            draft.replace(node, total)
    for node in reversed(list(draft.ops())):
        if not node.users and (node in found or packet(node) == "aten.broadcast_tensors"):
            draft.graph.erase_node(node)


def _selection(draft: Draft, node: fx.Node) -> _Selected | None:
    """Of ``x[mask]`` over the leading dims of x, or masked_select."""
    if packet(node) == "aten.index" and len(node.args[1]) == 1:  # type: ignore[arg-type]
        x, (mask,) = node.args  # type: ignore[misc]
    elif packet(node) == "aten.masked_select":
        x, mask = node.args
    else:
        return None
    if not (isinstance(x, fx.Node) and isinstance(mask, fx.Node)) or mask.meta["val"].dtype != torch.bool:
        return None
    whole, chosen = x.meta["val"].shape, mask.meta["val"].shape
    if not chosen or whole[: len(chosen)] != chosen or _unknown(whole):
        return None
    count, rest = math.prod(chosen), list(whole[len(chosen) :])
    rows, left_out = x, draft.emit(node, aten.logical_not.default, mask, like=node)
    if len(chosen) > 1:
        rows = draft.emit(node, aten.reshape.default, x, [count, *rest], like=node)
        left_out = draft.emit(node, aten.reshape.default, left_out, [count], like=node)
    return _Selected(_filled(draft, node, rows, left_out, 0), left_out, mask)


def _filled(draft: Draft, before: fx.Node, rows: fx.Node, left_out: fx.Node, value: int) -> fx.Node:
    """The rows, with `value` in those that are left out."""
    dims = rows.meta["val"].ndim
    if dims > 1:
        shape = [rows.meta["val"].shape[0], *[1] * (dims - 1)]
        left_out = draft.emit(before, aten.reshape.default, left_out, shape, like=before)
    return draft.emit(before, aten.masked_fill.Scalar, rows, left_out, value, like=before)


def _broadcast(draft: Draft, node: fx.Node, found: dict[fx.Node, _Selected]) -> _Selected | None:
    """Of an item of broadcast_tensors, which losses apply to what they compare."""
    if node.target is not operator.getitem or packet(node.args[0]) != "aten.broadcast_tensors":  # type: ignore[arg-type]
        return None
    together, index = node.args
    tensors = together.args[0]  # type: ignore[union-attr]
    if not set(tensors) <= set(found) or len({found[tensor].mask for tensor in tensors}) > 1:  # type: ignore[arg-type]
        return None
    one, result = found[tensors[index]], node.meta["val"]  # type: ignore[index]
    if any(tensor.meta["val"].ndim != result.ndim for tensor in tensors):  # type: ignore[union-attr]
        return None
    rows, shape = one.rows, [one.left_out.meta["val"].shape[0], *result.shape[1:]]
    if list(rows.meta["val"].shape) != shape:
        rows = draft.emit(node, aten.expand.default, rows, shape, like=node)
    return _Selected(rows, one.left_out, one.mask)


def _followed(draft: Draft, node: fx.Node, found: dict[fx.Node, _Selected]) -> _Selected | None:
    """Of an op that computes every row from that row."""
    selected = [found[argument] for argument in node.all_input_nodes if argument in found]
    if not selected or len({one.mask for one in selected}) > 1 or not _row_by_row(node, found):
        return None
    args, kwargs = _with_rows(node, found)
    rows = draft.emit(node, node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]
    return _Selected(rows, selected[0].left_out, selected[0].mask)


def _row_by_row(node: fx.Node, found: dict[fx.Node, _Selected]) -> bool:
    kind, first = packet(node), node.args[0] if node.args else None
    result = node.meta.get("val")
    if not isinstance(result, torch.Tensor):
        return False
    others = [n for n in node.all_input_nodes if n not in found]
    if kind == "aten.linear":
        return first in found and result.ndim > 1 and first not in others and not set(node.args[1:]) & set(found)
    if kind in _LAST_DIM:
        dim = node.args[_LAST_DIM[kind]]
        return result.ndim > 1 and dim in (-1, result.ndim - 1)
    if kind in ("aten.unsqueeze", "aten.squeeze"):
        # What is not dim 0, counted from either end.
        dim = node.args[1] if len(node.args) > 1 else 0
        ndim = max(result.ndim, first.meta["val"].ndim)  # type: ignore[union-attr]
        return isinstance(dim, int) and dim % ndim != 0
    if kind == "aten.div":
        if first not in found or node.args[1] in found or node.kwargs.get("rounding_mode"):
            return False
    elif kind == "aten.pow":
        if node.target is not aten.pow.Tensor_Scalar or not isinstance(node.args[1], (int, float)) or node.args[1] < 1:
            return False
    elif kind not in _POINTWISE:
        return False
    ndims = {n.meta["val"].ndim for n in node.all_input_nodes if n in found}
    # What is not selected has to broadcast over the rows.
    shapes = [n.meta["val"].shape for n in others]
    broadcast = all(not _unknown(shape) and (len(shape) < result.ndim or shape[0] == 1) for shape in shapes)
    return ndims == {result.ndim} and broadcast


def _with_rows(node: fx.Node, found: dict[fx.Node, _Selected]) -> Any:
    return map_arg((node.args, dict(node.kwargs)), lambda n: found[n].rows if n in found else n)


def _total(draft: Draft, node: fx.Node, found: dict[fx.Node, _Selected]) -> fx.Node | None:
    """What stands for a sum, mean or loss over the selected rows."""
    selected = [found[argument] for argument in node.all_input_nodes if argument in found]
    if not selected or len({one.mask for one in selected}) > 1:
        return None
    kind, one = packet(node), selected[0]
    (args, kwargs), first = _with_rows(node, found), node.args[0]
    if kind in _CLASS_LOSSES:
        target = node.args[1]
        if not (first in found and target in found) or found[target].rows.meta["val"].dtype.is_floating_point:
            return None
        reduction, ignored = _CLASS_LOSSES[kind]
        args = [*args, *(None, _MEAN, _IGNORED)[len(args) - 2 :]] if len(args) < 5 else list(args)
        if args[reduction] == _NONE or args[2] in found:
            return None
        args[1] = _filled(draft, node, args[1], one.left_out, args[ignored])
        return draft.emit(node, node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]
    if kind in _LOSSES:
        place = _LOSSES[kind]
        reduction = args[place] if len(args) > place else _MEAN
        if first not in found or node.args[1] not in found or reduction not in (_MEAN, _SUM) or kwargs:
            return None
        weights = [*args[2:place], *[None] * (place - len(args))]
        if any(weight is not None for weight in weights):
            return None
        args = [*args[:2], *weights, _NONE, *args[place + 1 :]]
        each = draft.emit(node, node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]
        return _reduced(draft, node, each, one, mean=reduction == _MEAN)
    if node.target in (aten.sum.default, aten.mean.default) and len(args) == 1:
        values = args[0]
        if kwargs.get("dtype") is not None:
            values = draft.emit(node, aten.to.dtype, values, kwargs["dtype"], like=node)
        return _reduced(draft, node, values, one, mean=packet(node) == "aten.mean")
    return None


def _reduced(draft: Draft, node: fx.Node, values: fx.Node, one: _Selected, mean: bool) -> fx.Node:
    """Sum or mean of [rows, ...] over the rows that are kept."""
    dtype = values.meta["val"].dtype
    wide = {"dtype": torch.float32} if mean and dtype in (torch.float16, torch.bfloat16) else {}
    values = _filled(draft, node, values, one.left_out, 0)
    total = draft.emit(node, aten.sum.default, values, like=node, **wide)
    if not mean:
        return total
    kept = draft.emit(node, aten.logical_not.default, one.left_out, like=node)
    count = draft.emit(node, aten.sum.default, kept, like=node)
    width = math.prod(values.meta["val"].shape[1:])
    if width != 1:
        count = draft.emit(node, aten.mul.Tensor, count, width, like=node)
    result = draft.emit(node, aten.div.Tensor, total, count, like=node)
    return draft.emit(node, aten.to.dtype, result, dtype, like=node) if wide else result


def _unknown(shape: Any) -> bool:
    return any(isinstance(extent, torch.SymInt) for extent in shape)
