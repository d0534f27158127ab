"""Written rules, by op. Everything here is proven by execution in tests/test_rules.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardplan.planner.placement import R, S
from shardplan.planner.rules import views
from shardplan.planner.rules.letters import Term, broadcast_terms, from_rule, linear_in, split_letters
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, mutated, tensor_args

aten = torch.ops.aten
Rule = Callable[[fx.Node], list[Strategy]]


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Value of a schema argument, given by position or by name, or its default."""
    for position, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value if declared.has_default_value() else default)
    return default


def shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [info(a).shape for a in tensor_args(node)]


# -- pointwise ---------------------------------------------------------------------------------------------------------

_LIKE_POINTWISE = frozenset(
    {
        aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype,
        aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
        aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarSelf,
        aten.where.ScalarOther, aten.where.Scalar, aten.dropout.default, aten.lift_fresh_copy.default,
        aten.copy.default, aten.isin.Tensor_Scalar, aten.bernoulli.default, aten.bernoulli.p, aten.rand_like.default,
        aten.randn_like.default, aten.expand_as.default, aten.masked_fill_.Scalar,
        aten.bitwise_not.default, aten.logical_not.default, aten.__and__.Tensor,
        aten.__or__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar,
    }
)  # fmt: skip
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor})
_ONE_LINEAR = frozenset(
    {
        aten.neg.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.mul.Scalar,
        aten.div.Scalar,
    }
)  # fmt: skip
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device})
RANDOM = frozenset(
    {aten.dropout.default, aten.bernoulli.default, aten.bernoulli.p, aten.rand_like.default, aten.randn_like.default}
)


def is_pointwise(target: Any) -> bool:
    return target in _LIKE_POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ())


def pointwise(node: fx.Node) -> list[Strategy]:
    target, sizes = node.target, shapes(node)
    terms, result = broadcast_terms(sizes, infos(node)[0].shape)
    impl = "dropout" if target in RANDOM else None
    found = split_letters(node, terms, [result] * len(infos(node)), impl=impl)
    count = len(sizes)
    if target in _SUMS and count == 2:
        found.append(linear_in(node, (0, 1)))
    elif target is aten.mul.Tensor:
        found += (
            [linear_in(node, (slot,)) for slot in range(count)]
            if count == 1 or node.args[0] is not node.args[1]
            else []
        )
    elif target is aten.div.Tensor:
        if isinstance(node.args[0], fx.Node) and node.args[0] is not node.args[1]:
            found.append(linear_in(node, (0,)))
    elif target in _ONE_LINEAR or (
        target in _CASTS
        and infos(node)[0].dtype.is_floating_point
        and info(tensor_args(node)[0]).dtype.is_floating_point
    ):
        found.append(linear_in(node, (0,)))
    return found


# -- products ----------------------------------------------------------------------------------------------------------


def linear(node: fx.Node) -> list[Strategy]:
    found = from_rule(node, "... k, n k, n -> ... n", partial=("k",), summand=2)
    return [*found, linear_in(node, (0, 2) if len(tensor_args(node)) > 2 else (0,))]


def addmm(node: fx.Node) -> list[Strategy]:
    bias = shapes(node)[0]
    term: Term = [None if extent == 1 else x for x, extent in zip(["m", "n"][2 - len(bias) :], bias, strict=True)]
    found = split_letters(node, [term, ["m", "k"], ["k", "n"]], [["m", "n"]], partial=("k",), summand=0)
    return [*found, linear_in(node, (0, 1))]


def baddbmm(node: fx.Node) -> list[Strategy]:
    added = shapes(node)[0]
    term: Term = [None if e == 1 else x for x, e in zip(["b", "m", "n"][3 - len(added) :], added, strict=True)]
    found = split_letters(node, [term, ["b", "m", "k"], ["b", "k", "n"]], [["b", "m", "n"]], partial=("k",), summand=0)
    return [*found, linear_in(node, (0, 1)), linear_in(node, (0, 2))]


def matmul(node: fx.Node) -> list[Strategy]:
    left, right = shapes(node)
    if len(left) == 1 and len(right) == 1:
        found = from_rule(node, "k, k -> ", partial=("k",))
    elif len(left) == 1 or len(right) == 1:
        rule = "k, ... k n -> ... n" if len(left) == 1 else "... m k, k -> ... m"
        found = from_rule(node, rule, partial=("k",))
    else:
        batch = infos(node)[0].shape[:-2]
        terms, result = broadcast_terms([left[:-2], right[:-2]], batch)
        found = split_letters(
            node, [[*terms[0], "m", "k"], [*terms[1], "k", "n"]], [[*result, "m", "n"]], partial=("k",)
        )
    return [*found, linear_in(node, (0,)), linear_in(node, (1,))]


def einsum(node: fx.Node) -> list[Strategy]:
    text = str(node.args[0]).replace(" ", "")
    if "->" not in text or "." in text:
        return []
    left, right = text.split("->")
    terms = [list(part) for part in left.split(",")]
    if any(len(set(term)) != len(term) for term in terms):
        return []
    found = split_letters(node, terms, [list(right)], partial={x for t in terms for x in t} - set(right))
    return [*found, *(linear_in(node, (slot,)) for slot in range(len(terms)))]


def convolution(node: fx.Node) -> list[Strategy]:
    """x [n, c, ...], weight [o, c / groups, ...], bias [o]. With groups the channels are split group by group."""
    spatial: Term = [None] * (len(shapes(node)[0]) - 2)
    groups = argument(node, "groups", 1)
    has_bias = len(tensor_args(node)) > 2
    bias: list[Term] = [["o" if groups == 1 else "g"]] if has_bias else []
    if groups == 1:
        terms = [["n", "c", *spatial], ["o", "c", *spatial], *bias]
        found = split_letters(node, terms, [["n", "o", *spatial]], partial=("c",), summand=2 if has_bias else None)
    else:
        found = split_letters(node, [["n", "g", *spatial], ["g", None, *spatial], *bias], [["n", "g", *spatial]])
    return [*found, linear_in(node, (0, 2) if has_bias else (0,))]


def attention(node: fx.Node) -> list[Strategy]:
    """scaled_dot_product_attention. Grouped key-value heads are split along with the query heads."""
    sizes = shapes(node)
    query = sizes[0]
    batch: Term = [f"b{i}" for i in range(len(query) - 2)]
    terms: list[Term] = [[*batch, "q", None], [*batch, None, None], [*batch, None, None]]
    for slot in (1, 2):
        for i in range(len(query) - 2):
            if sizes[slot][i] == 1 and query[i] != 1:
                terms[slot][i] = None
    if len(sizes) > 3:
        mask = sizes[3]
        letters: Term = [*batch, "q", None]
        offset = len(letters) - len(mask)
        terms.append([letters[offset + i] if extent > 1 else None for i, extent in enumerate(mask)])
    causal = bool(argument(node, "is_causal", False))
    drops = float(argument(node, "dropout_p", 0.0) or 0.0) > 0
    return split_letters(
        node, terms, [[*batch, "q", None]], skip=("q",) if causal else (), impl="attention" if drops else None
    )


# -- normalisation, reductions -----------------------------------------------------------------------------------------


def layer_norm(node: fx.Node) -> list[Strategy]:
    rank = len(shapes(node)[0])
    inner = len(argument(node, "normalized_shape"))
    term: Term = [*(f"b{i}" for i in range(rank - inner)), *[None] * inner]
    count = len(tensor_args(node))
    results: list[Term] = [term, *[term[: len(r.shape)] for r in infos(node)[1:]]]
    return split_letters(node, [term, *[[None] * inner] * (count - 1)], results)


def group_norm(node: fx.Node) -> list[Strategy]:
    rank = len(shapes(node)[0])
    return split_letters(
        node, [["n", *[None] * (rank - 1)], *[[None]] * (len(tensor_args(node)) - 1)], [["n", *[None] * (rank - 1)]]
    )


def batch_norm(node: fx.Node) -> list[Strategy]:
    """Channels are independent. A split of the batch or of positions needs the statistics of all ranks in training."""
    rank = len(shapes(node)[0])
    spatial: Term = [f"s{i}" for i in range(rank - 2)]
    term: Term = ["n", "c", *spatial]
    training = bool(argument(node, "training", False))
    others: list[Term] = [["c"]] * (len(tensor_args(node)) - 1)
    impl = {x: "batch_norm" for x in ("n", *(s for s in spatial if s))} if training else None
    return split_letters(node, [term, *others], [term], impl=impl)


def softmax(node: fx.Node) -> list[Strategy]:
    return views.other_dims(node, (argument(node, "dim"),))


def cumulative(node: fx.Node) -> list[Strategy]:
    return views.other_dims(node, (argument(node, "dim"),), linear=node.target is aten.cumsum.default)


def _reduced(node: fx.Node) -> tuple[Term, Term, set[str]]:
    """(term, result term, reduced letters) of a reduction."""
    rank = len(shapes(node)[0])
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else (dims or list(range(rank)))
    whole = {dim % max(rank, 1) for dim in dims}
    keep = bool(argument(node, "keepdim", False))
    term: Term = [f"b{i}" for i in range(rank)]
    result = [None if i in whole else x for i, x in enumerate(term) if keep or i not in whole]
    return term, result, {f"b{i}" for i in whole}


def sum_(node: fx.Node) -> list[Strategy]:
    term, result, gone = _reduced(node)
    return [*split_letters(node, [term], [result], partial=gone), linear_in(node, (0,))]


def mean(node: fx.Node) -> list[Strategy]:
    term, result, gone = _reduced(node)
    return [*split_letters(node, [term], [result], partial=gone, scale=gone), linear_in(node, (0,))]


def other_reduction(node: fx.Node) -> list[Strategy]:
    """max, argmax, var, all, ...: only the dims that stay can be split."""
    term, result, gone = _reduced(node)
    return split_letters(node, [term], [result] * len(infos(node)), skip=gone)


def top(node: fx.Node) -> list[Strategy]:
    """topk, sort: along one dim."""
    return views.other_dims(node, (argument(node, "dim", -1),))


# -- embeddings, indexing ----------------------------------------------------------------------------------------------


def embedding(node: fx.Node) -> list[Strategy]:
    index: Term = [f"b{i}" for i in range(len(shapes(node)[1]))]
    impl = {"v": "vocab_embedding"}
    return split_letters(node, [["v", "e"], index], [[*index, "e"]], partial=("v",), impl=impl)


def gather(node: fx.Node) -> list[Strategy]:
    dim = argument(node, "dim") % len(shapes(node)[0])
    source, index = shapes(node)
    term: Term = [f"b{i}" if i != dim and source[i] == index[i] else None for i in range(len(source))]
    found = split_letters(node, [term, term], [term])
    along: Term = [f"i{i}" if i == dim else None for i in range(len(source))]
    return [*found, *split_letters(node, [[None] * len(source), along], [along])]


def overwrite(node: fx.Node) -> list[Strategy]:
    """slice_scatter, select_scatter: a part of one dim replaced."""
    dim = argument(node, "dim", 0)
    rank = len(shapes(node)[0])
    term: Term = [None if i == dim % rank else f"b{i}" for i in range(rank)]
    part = term if len(shapes(node)[1]) == rank else [x for i, x in enumerate(term) if i != dim % rank]
    return [*split_letters(node, [term, part], [term]), linear_in(node, (0, 1))]


def index_select(node: fx.Node) -> list[Strategy]:
    rank = len(shapes(node)[0])
    dim = argument(node, "dim") % rank
    term: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    result: Term = ["i" if i == dim else f"b{i}" for i in range(rank)]
    return [*split_letters(node, [term, ["i"]], [result]), linear_in(node, (0,))]


def index(node: fx.Node) -> list[Strategy]:
    """x[i, j, ...]: dims that are not indexed, and the dims of the indices, where these stand together."""
    indices = node.args[1]
    sizes = shapes(node)
    assert isinstance(indices, (list, tuple))
    used = [i for i, item in enumerate(indices) if item is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return []
    rank = len(sizes[0])
    taken = sizes[1:]
    if any(info(a).dtype == torch.bool for a in tensor_args(node)[1:]):
        return []
    common = tuple(torch.broadcast_shapes(*taken))
    terms, letters = broadcast_terms(taken, common)
    letters = [None if x is None else f"i{x}" for x in letters]
    terms = [[None if x is None else f"i{x}" for x in term] for term in terms]
    source: Term = [None if i in used else f"b{i}" for i in range(rank)]
    result = [*source[: used[0]], *letters, *source[used[-1] + 1 :]]
    return split_letters(node, [source, *terms], [result])


def one_hot(node: fx.Node) -> list[Strategy]:
    term: Term = [f"b{i}" for i in range(len(shapes(node)[0]))]
    return split_letters(node, [term], [[*term, None]])


def factory(node: fx.Node) -> list[Strategy]:
    """full, zeros, new_ones: every part of the result can be made on its own, and of an argument only the dtype and
    the device are read, so it may lie in any way."""
    result = infos(node)[0].shape
    found = split_letters(node, [[None] * len(s) for s in shapes(node)], [[f"b{i}" for i in range(len(result))]])
    for source in shapes(node)[:1]:
        for dim, extent in enumerate(source):
            found.append(Strategy(f"a{dim}", (S(dim),), (R,)))
            found += [Strategy(f"a{dim}", (S(dim),), (S(i),)) for i, size in enumerate(result) if size == extent > 1]
    return found


# -- losses ------------------------------------------------------------------------------------------------------------


def cross_entropy(node: fx.Node) -> list[Strategy]:
    """Token dims: a mean divides by the count of the whole batch. Class dim: vocab parallel."""
    logits, target = shapes(node)[:2]
    weight = argument(node, "weight")
    reduction = argument(node, "reduction", 1)
    rank = len(logits)
    classes = 1 if rank > 1 else 0
    tokens: Term = [f"b{i}" for i in range(rank) if i != classes]
    term: Term = [*tokens[:1], None, *tokens[1:]] if rank > 1 else [None]
    weights: list[Term] = [[None]] if weight is not None else []
    if len(target) == rank and info(tensor_args(node)[1]).dtype.is_floating_point:
        gone = [x for x in tokens if x] if reduction else []
        scale = gone if reduction == 1 else []
        return split_letters(node, [term, term, *weights], [[] if reduction else tokens], partial=gone, scale=scale)
    found = split_letters(
        node, [term, tokens, *weights], [[] if reduction else tokens],
        partial=[x for x in tokens if x] if reduction else (), impl="cross_entropy",
    )  # fmt: skip
    if weight is None:
        ins = (S(classes), *(R for _ in tensor_args(node)[1:]))
        found.append(Strategy("class", ins, (R,), "cross_entropy"))
    return found


def elementwise_loss(node: fx.Node) -> list[Strategy]:
    """mse, l1, bce, ...: reduction 0 none, 1 mean, 2 sum."""
    sizes = shapes(node)
    full = tuple(torch.broadcast_shapes(*sizes))
    terms, letters = broadcast_terms(sizes, full)
    reduction = argument(node, "reduction", 1)
    if not reduction:
        return split_letters(node, terms, [letters])
    gone = [x for x in letters if x]
    return split_letters(node, terms, [[]], partial=gone, scale=gone if reduction == 1 else ())


# -- spatial -----------------------------------------------------------------------------------------------------------


def spatial(node: fx.Node) -> list[Strategy]:
    """Pooling, upsampling: samples and channels are independent."""
    rank, kept = len(shapes(node)[0]), 2
    window = {"max_pool1d": 1, "avg_pool1d": 1, "adaptive_avg_pool1d": 1}.get(node.target._opname, 2)  # type: ignore[union-attr]
    if "3d" in node.target._opname:  # type: ignore[union-attr]
        window = 3
    kept = rank - window
    term: Term = [*(f"b{i}" for i in range(kept)), *[None] * window]
    return split_letters(node, [term], [term] * len(infos(node)))


def padded_dims(node: fx.Node) -> list[int]:
    pads = list(argument(node, "pad"))
    rank = len(shapes(node)[0])
    return [rank - 1 - i // 2 for i in range(len(pads)) if pads[i]]


def repeat(node: fx.Node) -> list[Strategy]:
    counts = list(node.args[1])  # type: ignore[arg-type]
    shape = shapes(node)[0]
    offset = len(counts) - len(shape)
    result: Term = [None if i < offset or counts[i] != 1 else f"b{i - offset}" for i in range(len(counts))]
    term: Term = [f"b{i}" if counts[offset + i] == 1 else None for i in range(len(shape))]
    return [*split_letters(node, [term], [result]), linear_in(node, (0,))]


def slice_(node: fx.Node) -> list[Strategy]:
    """A dim that is cut cannot be split, one that is taken whole can."""
    before, after = shapes(node)[0], infos(node)[0].shape
    return views.other_dims(node, [i for i in range(len(before)) if before[i] != after[i]], linear=True)


def repeat_interleave(node: fx.Node) -> list[Strategy]:
    dim = argument(node, "dim")
    return [] if dim is None else [*views.other_dims(node, ()), linear_in(node, (0,))]


def _dim(name: str = "dim", linear: bool = True) -> Rule:
    return lambda node: views.other_dims(node, (argument(node, name),), linear)


RULES: dict[Any, Rule] = {
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.baddbmm.default: baddbmm,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.einsum.default: einsum,
    aten.scaled_dot_product_attention.default: attention,
    aten.layer_norm.default: layer_norm,
    aten.native_layer_norm.default: layer_norm,
    aten.rms_norm.default: layer_norm,
    aten.group_norm.default: group_norm,
    aten.batch_norm.default: batch_norm,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.log_softmax.int: softmax,
    aten._log_softmax.default: softmax,
    aten.cumsum.default: cumulative,
    aten.cumprod.default: cumulative,
    aten.sum.default: sum_,
    aten.sum.dim_IntList: sum_,
    aten.mean.default: mean,
    aten.mean.dim: mean,
    aten.embedding.default: embedding,
    aten.gather.default: gather,
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
    aten.one_hot.default: one_hot,
    aten.slice_scatter.default: overwrite,
    aten.select_scatter.default: overwrite,
    aten.cross_entropy_loss.default: cross_entropy,
    aten.select.int: lambda node: views.select(node, argument(node, "dim")),
    aten.unbind.int: lambda node: views.select(node, argument(node, "dim", 0)),
    aten.chunk.default: lambda node: views.sections(node, argument(node, "dim", 0)),
    aten.split.Tensor: lambda node: views.sections(node, argument(node, "dim", 0)),
    aten.split.sizes: lambda node: views.sections(node, argument(node, "dim", 0)),
    aten.split_with_sizes.default: lambda node: views.sections(node, argument(node, "dim", 0)),
    aten.stack.default: lambda node: views.stack(node, argument(node, "dim", 0)),
    aten.cat.default: _dim(),
    aten.flip.default: lambda node: views.other_dims(node, argument(node, "dims"), True),
    aten.roll.default: lambda node: views.other_dims(node, argument(node, "dims") or range(len(shapes(node)[0])), True),
    aten.diff.default: _dim(linear=False),
    aten.slice.Tensor: slice_,
    aten.expand.default: views.expand,
    aten.pad.default: lambda node: views.other_dims(node, padded_dims(node)),
    aten.constant_pad_nd.default: lambda node: views.other_dims(node, padded_dims(node)),
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.topk.default: top,
    aten.sort.default: top,
    aten.sort.stable: top,
    aten.argsort.default: top,
    aten.glu.default: _dim(linear=False),
    aten.tril.default: lambda node: views.other_dims(node, (-1, -2), True),
    aten.triu.default: lambda node: views.other_dims(node, (-1, -2), True),
    aten.broadcast_tensors.default: lambda node: (
        views.other_dims(node, ()) if len({*shapes(node), *(r.shape for r in infos(node))}) == 1 else []
    ),
}
RULES |= dict.fromkeys(views.RESHAPES, views.reshape)
RULES |= dict.fromkeys(views.PERMUTES, views.permute)
RULES |= dict.fromkeys(
    (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default), convolution
)
RULES |= dict.fromkeys(
    (aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.max_pool1d.default,
     aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default, aten.max_pool3d.default, aten.avg_pool3d.default,
     aten.adaptive_avg_pool3d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
     aten.max_pool2d_with_indices.default), spatial,
)  # fmt: skip
RULES |= dict.fromkeys(
    (aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.max.default, aten.min.default,
     aten.argmax.default, aten.argmin.default, aten.var.correction, aten.var.dim, aten.std.dim, aten.std.correction,
     aten.any.dim, aten.all.dim, aten.any.default, aten.all.default, aten.logsumexp.default, aten.prod.dim_int,
     aten.linalg_vector_norm.default), other_reduction,
)  # fmt: skip
RULES |= dict.fromkeys(
    (aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
     aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default, aten.kl_div.default,
     aten.soft_margin_loss.default), elementwise_loss,
)  # fmt: skip
RULES |= dict.fromkeys(
    (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.new_zeros.default,
     aten.new_ones.default, aten.new_full.default, aten.new_empty.default), factory,
)  # fmt: skip


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of an op, or None. An op that writes to a buffer keeps that buffer whole."""
    if node.target in RULES:
        return RULES[node.target]
    return pointwise if is_pointwise(node.target) else None


def unsplittable(node: fx.Node) -> bool:
    """Ops whose results are computed whole on every rank: those that write to buffers, normalisation apart."""
    return bool(mutated(node)) and node.target is not aten.batch_norm.default
