"""Recover what masks mean: `is_causal`, no mask at all, and padding masks that are read at identity positions.

Attention masks are traced as comparisons of positions, [batch, 1, query, key]. Without this pass attention would be
costed, and run, as if every mask were arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft, aten_ops, packet
from shardplan.planner.passes.known import Evaluator, Known

name = "fold-masks"

aten = torch.ops.aten

EXACT_LENGTH = 16384
SAMPLED_POSITIONS = 4096


def apply(draft: Draft) -> None:
    """Each rule either replaces a node by a simpler one of the same value, or leaves it."""
    evaluate = Evaluator(draft)
    for node in draft.ops():
        rule = _RULES.get(packet(node))
        if rule is not None:
            rule(draft, node, evaluate)


def _uniform(value: Known | None) -> Any:
    """The one number that the value consists of, or None."""
    if value is None or value.data is None or value.data.numel() != 1:
        return None
    return value.data.item()


def _replace(draft: Draft, node: fx.Node, value: fx.Node) -> None:
    """Replace by `value`, cast and broadcast to the node's dtype and shape."""
    held = node.meta["val"]
    if value.meta["val"].dtype != held.dtype:
        value = draft.emit(node, aten.to.dtype, value, held.dtype, like=node)
    if value.meta["val"].shape != held.shape:
        value = draft.emit(node, aten.expand.default, value, list(held.shape), like=node)
    draft.replace(node, value)


def _fold_and(draft: Draft, node: fx.Node, evaluate: Evaluator) -> None:
    if node.meta["val"].dtype != torch.bool or len(node.args) != 2:
        return
    left, right = node.args
    neutral = packet(node) not in ("aten.__or__", "aten.bitwise_or", "aten.logical_or")
    for kept, other in ((left, right), (right, left)):
        if isinstance(kept, fx.Node) and isinstance(other, fx.Node) and _uniform(evaluate(other)) is neutral:
            return _replace(draft, node, kept)


def _fold_where(draft: Draft, node: fx.Node, evaluate: Evaluator) -> None:
    chosen = _uniform(evaluate(node.args[0]))
    if isinstance(chosen, bool) and len(node.args) == 3:
        branch = node.args[1] if chosen else node.args[2]
        if isinstance(branch, fx.Node):
            _replace(draft, node, branch)


def _fold_masked_fill(draft: Draft, node: fx.Node, evaluate: Evaluator) -> None:
    source = node.args[0]
    if _uniform(evaluate(node.args[1])) is False and isinstance(source, fx.Node):
        _replace(draft, node, source)


def _fold_index(draft: Draft, node: fx.Node, evaluate: Evaluator) -> None:
    """x[arange(b)[:, None], arange(s)[None, :]] is a reshape of x."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    extents = source.meta["val"].shape
    if len(indices) != len(extents) or any(not isinstance(index, fx.Node) for index in indices):
        return
    last = -1
    rank = node.meta["val"].ndim
    for extent, index in zip(extents, indices, strict=True):
        value = evaluate(index)
        if value is None or value.data is None or value.data.dtype == torch.bool:
            return
        data = value.data
        long = [rank - data.ndim + dim for dim in range(data.ndim) if data.shape[dim] > 1]
        if extent == 1 and not long and data.item() == 0:
            continue
        if len(long) != 1 or long[0] <= last or data.numel() != extent:
            return
        if not torch.equal(data.flatten(), torch.arange(extent, dtype=data.dtype)):
            return
        last = long[0]
    if node.meta["val"].numel() == source.meta["val"].numel():
        shape = list(node.meta["val"].shape)
        draft.replace(node, draft.emit(node, aten.reshape.default, source, shape, like=node))


def _fold_attention(draft: Draft, node: fx.Node, evaluate: Evaluator) -> None:
    args = list(node.args) + [None, 0.0, False][len(node.args) - 3 :]
    mask = node.kwargs.get("attn_mask", args[3])
    if not isinstance(mask, fx.Node) or node.kwargs.get("is_causal", args[5]):
        return
    if mask not in evaluate.forms:
        evaluate.forms[mask] = mask_form(evaluate(mask))
    form = evaluate.forms[mask]
    if form is not None:
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}
        node.args = (*args[:3], None, kwargs.pop("dropout_p", args[4]), form == "causal")
        node.kwargs = kwargs


def mask_form(value: Known | None) -> str | None:
    """ "causal" (query i sees keys 0 .. i, square), "all" (everything is seen), or None for anything else.

    Up to `EXACT_LENGTH` positions every element is compared, above that the rows and columns of a grid of
    `SAMPLED_POSITIONS` positions, neighbours included.
    """
    if value is None or len(value.shape) < 2 or any(extent != 1 for extent in value.extents()[:-2]):
        return None
    queries, keys = value.shape[-2:]
    grids = [_grid(queries), _grid(keys)]
    causal, everything = queries == keys and queries > 1, True
    step = max(1, (1 << 24) // max(len(grids[1]), 1))
    for rows in grids[0].split(step):
        seen = _seen(value.block(rows, grids[1]))
        if seen is None:
            return None
        causal = causal and bool((seen == (grids[1][None] <= rows[:, None])).all())
        everything = everything and bool(seen.all())
        if not causal and not everything:
            return None
    return "causal" if causal else "all"


def _grid(length: int) -> torch.Tensor:
    if length <= EXACT_LENGTH:
        return torch.arange(length)
    coarse = torch.linspace(0, length - 1, SAMPLED_POSITIONS // 2).long()
    return torch.cat([coarse, (coarse + 1).clamp(max=length - 1)]).unique()


def _seen(block: torch.Tensor) -> torch.Tensor | None:
    """Which keys are seen: True in a boolean mask; 0 against a very negative number in an additive one."""
    if block.dtype == torch.bool:
        return block
    if not block.dtype.is_floating_point:
        return None
    lowest = torch.finfo(block.dtype).min
    seen, hidden = block == 0, block <= lowest / 2
    return seen if bool((seen | hidden).all()) else None


Rule = Callable[[Draft, fx.Node, Evaluator], None]
_RULES: dict[str, Rule] = {
    "aten.index": _fold_index,
    "aten.where": _fold_where,
    "aten.masked_fill": _fold_masked_fill,
    "aten.scaled_dot_product_attention": _fold_attention,
} | dict.fromkeys(aten_ops("__and__ __or__ bitwise_and bitwise_or logical_and logical_or"), _fold_and)
