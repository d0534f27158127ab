"""Arguments that are known to count up: the rows of ``x[arange(batch), last]``, the offsets of bags of one size.

Split along them, the op needs only its own part of what they point into, once they are counted from that part's start;
that is what the implementations ``positions`` and ``embedding_bag`` do.
"""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.placement import P, R, S
from shardplan.planner.rules.letters import Term, read_whole
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, is_tensor, resolve, tensor_args

aten = torch.ops.aten

_COUNTS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})
_KEEPS_VALUES = frozenset(
    {
        aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default,
        aten.clone.default, aten.alias.default, aten.detach.default, aten.unsqueeze.default, aten.view.default,
        aten.reshape.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default, aten._unsafe_view.default,
    }
)  # fmt: skip


def counts(value: fx.Node) -> tuple[int, int] | None:
    """(dim, step) where the value is 0, step, 2 step, ... along `dim` and does not vary along the others."""
    node = resolve(value)[0]
    if node.op != "call_function" or not is_tensor(value) or info(value).dtype.is_floating_point:
        return None
    if node.target in _COUNTS:
        start, step = argument(node, "start", 0), argument(node, "step", 1)
        return (0, step) if start == 0 and isinstance(step, int) and step > 0 else None
    if node.target not in _KEEPS_VALUES:
        return None
    source = tensor_args(node)[0]
    found = counts(source)
    if found is None:
        return None
    before, after = info(source).shape, info(value).shape
    extent = before[found[0]]
    if node.target is aten.expand.default:
        return found[0] + len(after) - len(before), found[1]
    places = [dim for dim, size in enumerate(after) if size > 1]
    return (places[0], found[1]) if len(places) == 1 and after[places[0]] == extent else None


def rows(node: fx.Node, source: Term, terms: list[Term], used: list[int]) -> tuple[Term, dict[str, str]]:
    """For an op that indexes the dims `used` of its first tensor: the source's letters, where an index that counts
    through all of a dim lends it its own; and the implementation of those letters."""
    indices = [argument(node, "indices")[dim] for dim in used]
    whole = shapes(node)[0]
    source, impl = list(source), {}
    for dim, index, term in zip(used, indices, terms, strict=True):
        found = counts(index)
        if found is None or found[1] != 1 or info(index).shape[found[0]] != whole[dim]:
            continue
        letter = term[found[0]]
        if letter is not None and letter not in impl:
            source[dim] = letter
            impl[letter] = "positions"
    return source, impl


# -- bags of embeddings ------------------------------------------------------------------------------------------------

SUM, MEAN, MAX = 0, 1, 2


def bag_step(node: fx.Node) -> int | None:
    """How many indices every bag has, where it is known that all have as many."""
    _, indices, offsets = shapes(node)[:3]
    found = counts(tensor_args(node)[2])
    if found is None or argument(node, "include_last_offset", False) or offsets[0] * found[1] != indices[0]:
        return None
    return found[1]


def embedding_bag(node: fx.Node) -> list[Strategy]:
    """weight [v, e], indices [n], offsets [bags], weights of samples [n] -> result [bags, e], bag of every index [n],
    size of every bag [bags], and what a maximum keeps.

    e can always be split; bags where all are of one size; v where rows are added up.
    """
    weight, *others = read_whole(node)
    mode, count = argument(node, "mode", SUM), len(others)
    # What a maximum keeps has the result's shape; otherwise it is empty or one number a bag, as the device likes.
    result, _, _, kept = (made.shape for made in infos(node))
    by_bag = S(0) if kept[:1] == result[:1] else R
    found = [Strategy("e", (S(1), *others), (S(1), R, R, S(1) if len(kept) > 1 else R))]
    if argument(node, "scale_grad_by_freq", False):
        return found
    if bag_step(node) is not None:
        found.append(Strategy("b", (weight, *[S(0)] * count), (S(0), S(0), S(0), by_bag), "embedding_bag"))
    if mode != MAX:
        found.append(Strategy("v", (S(0), *others), (P, R, R, R), "embedding_bag"))
    return found
