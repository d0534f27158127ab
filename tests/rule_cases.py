"""Calls of every op that has a dimension rule, with the strategies that the rule must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.execution import frozen

aten = torch.ops.aten
STATISTICS = (0.1, 1e-5, False)
ONES = ([1], [1], [1])


@dataclass(frozen=True, eq=False)
class Recipe:
    """A random tensor, made anew for every test; one recipe used twice in a call is one tensor."""

    make: Callable[[], torch.Tensor]


def t(*shape: int) -> Recipe:
    return Recipe(lambda: torch.randn(shape, dtype=torch.float64))


def large(*shape: int) -> Recipe:
    return Recipe(lambda: 9 * torch.randn(shape, dtype=torch.float64))


def pos(*shape: int) -> Recipe:
    return Recipe(lambda: 0.5 + torch.rand(shape, dtype=torch.float64))


def fixed(*shape: int) -> Recipe:
    """Positive, and never with a gradient."""
    return Recipe(lambda: frozen(0.5 + torch.rand(shape, dtype=torch.float64)))


def probability(*shape: int) -> Recipe:
    return Recipe(lambda: torch.randn(shape, dtype=torch.float64).sigmoid())


def sign(*shape: int) -> Recipe:
    return Recipe(lambda: torch.randn(shape, dtype=torch.float64).sign())


def rising(extent: int) -> Recipe:
    return Recipe(lambda: torch.randn(extent, dtype=torch.float64).sort().values)


def i(high: int, *shape: int) -> Recipe:
    return Recipe(lambda: torch.randint(0, high, shape))


def given(*values: int) -> Recipe:
    return Recipe(lambda: torch.tensor(values))


def b(*shape: int) -> Recipe:
    return Recipe(lambda: torch.rand(shape) > 0.4)


def causal(*shape: int) -> Recipe:
    return Recipe(lambda: torch.ones(shape, dtype=torch.bool).tril())


def labels(classes: int, *shape: int) -> Recipe:
    """Class indices, some of them ignored, unevenly."""

    def make() -> torch.Tensor:
        found = torch.randint(0, classes, shape)
        found[0] = -100
        return found

    return Recipe(make)


Case = tuple[str, str, Any, tuple[Any, ...], dict[str, Any]]


def case(name: str, names: str, target: Any, *args: Any, **kwargs: Any) -> Case:
    """names: the strategies that there must be."""
    return name, names, target, args, kwargs


def build(value: Any, made: dict[Recipe, torch.Tensor]) -> Any:
    """Arguments with recipes carried out."""
    if isinstance(value, Recipe):
        return made.setdefault(value, value.make()) if value not in made else made[value]
    if isinstance(value, (list, tuple)):
        return type(value)(build(item, made) for item in value)
    if isinstance(value, dict):
        return {key: build(item, made) for key, item in value.items()}
    return value


POINTWISE = [
    case("add", "- d b0 b1 p", aten.add.Tensor, t(4, 8), t(4, 8)),
    case("add broadcast", "- d b0 b1 b2 p", aten.add.Tensor, t(4, 1, 8), t(4, 8), alpha=2),
    case("add scalar", "- d b0", aten.add.Tensor, t(4, 8), 1.5),
    case("sub", "b0 b1 p", aten.sub.Tensor, t(4, 8), t(8)),
    case("rsub", "b0 p", aten.rsub.Tensor, t(4, 8), t(4, 8)),
    case("mul", "b0 b1 p", aten.mul.Tensor, t(4, 8), t(4, 1)),
    case("mul scalar", "b0 p", aten.mul.Tensor, t(4, 8), 0.5),
    case("mul int", "b0 p", aten.mul.Tensor, i(9, 4, 8), i(9, 4, 8)),
    case("div", "b0 p", aten.div.Tensor, t(4, 8), pos(4, 1)),
    case("div scalar", "b0 p", aten.div.Tensor, t(4, 8), 3),
    case("floor divide", "b0", aten.div.Tensor_mode, i(9, 4, 8), 2, rounding_mode="floor"),
    case("neg", "b0 p", aten.neg.default, t(4, 8)),
    case("pow", "b0 b1", aten.pow.Tensor_Scalar, t(4, 8), 3),
    case("pow tensor", "b0 b1", aten.pow.Tensor_Tensor, pos(4, 8), t(8)),
    case("gelu", "b0", aten.gelu.default, t(4, 8), approximate="tanh"),
    case("silu", "b0", aten.silu.default, t(4, 8)),
    case("relu", "b0", aten.relu.default, t(4, 8)),
    case("clamp", "b0", aten.clamp.default, t(4, 8), -0.5, 0.5),
    case("clamp tensor", "b0 b1", aten.clamp.Tensor, t(4, 8), t(4, 1), t(8)),
    case("lerp", "b0 b1", aten.lerp.Tensor, t(4, 8), t(8), t(4, 1)),
    case("addcmul", "b0 b1", aten.addcmul.default, t(4, 8), t(4, 1), t(8)),
    case("prelu", "- d b0 c b2", aten.prelu.default, t(4, 8, 6), t(8)),
    case("prelu one", "- d b0 b1 b2", aten.prelu.default, t(4, 8, 6), t(1)),
    case("maximum", "b0 b1", aten.maximum.default, t(4, 8), t(8)),
    case("min other", "b0 b1", aten.min.other, t(4, 8), t(8)),
    case("where", "b0 b1 p", aten.where.self, b(4, 1), t(4, 8), t(8)),
    case("where scalar", "b0 b1", aten.where.ScalarOther, b(4, 8), t(8), -3.0),
    case("where zero", "b0 b1 p", aten.where.ScalarOther, b(4, 8), t(8), 0.0),
    case("where zero self", "b0 b1 p", aten.where.ScalarSelf, b(4, 8), 0, t(8)),
    case("masked_fill", "b0 b1", aten.masked_fill.Scalar, t(4, 8), b(4, 1), -9.0),
    case("masked_fill zero", "b0 b1 p", aten.masked_fill.Scalar, t(4, 8), b(4, 1), 0),
    case("masked_fill tensor", "b0 b1", aten.masked_fill.Tensor, t(4, 8), b(8), pos()),
    case("to", "b0 p", aten.to.dtype, t(4, 8), torch.float64),
    case("to int", "b0", aten.to.dtype, large(4, 8), torch.int64),
    case("to from int", "b0 p", aten.to.dtype, i(9, 4, 8), torch.float64),
    case("to from bool", "b0", aten.to.dtype, b(4, 8), torch.float64),
    case("type_as", "b0", aten.type_as.default, i(9, 4, 8), t(4, 8)),
    case("contiguous", "b0 p", aten.contiguous.default, t(4, 8)),
    case("clone", "b0 p", aten.clone.default, t(4, 8)),
    case("alias", "b0 p", aten.alias.default, t(4, 8)),
    case("detach", "- b0 p", aten.detach.default, t(4, 8)),
    case("eq", "- b0 b1", aten.eq.Tensor, i(3, 4, 8), i(3, 4, 1)),
    case("gt float", "- b0 b1", aten.gt.Tensor, t(4, 8), t(4, 1)),
    case("and", "b0 b1", aten.__and__.Tensor, b(4, 8), b(8)),
    case("logical_not", "b0 b1", aten.logical_not.default, b(4, 8)),
    case("zeros_like", "b0 b1", aten.zeros_like.default, t(4, 8)),
    case("full_like", "b0 b1", aten.full_like.default, t(4, 8), 3.0),
    case("expand_as", "b0 b1", aten.expand_as.default, t(1, 8), t(4, 8)),
    case("isin", "b0 b1", aten.isin.Tensor_Tensor, i(9, 4, 8), i(9, 4)),
    case("bucketize", "b0 b1", aten.bucketize.Tensor, t(4, 8), rising(4)),
    case("multiply", "b0 p", aten.multiply.Tensor, t(4, 8), t(8)),
    case("divide", "b0 p", aten.divide.Tensor, t(4, 8), pos(8)),
    case("subtract", "b0 p", aten.subtract.Tensor, t(4, 8), t(8)),
    case("isclose", "b0 b1", aten.isclose.default, t(4, 8), t(4, 8)),
    case("resolve_conj", "b0", aten.resolve_conj.default, t(4, 8)),
    case("resolve_neg", "b0", aten.resolve_neg.default, t(4, 8)),
    case("softplus", "b0", aten.softplus.default, t(4, 8)),
    case("same twice", "b0 p", aten.mul.Tensor, *(2 * [t(4, 8)])),
    case("dropout idle", "b0 p", aten.dropout.default, t(4, 8), 0.5, False),
    case("dropout zero", "b0 p", aten.dropout.default, t(4, 8), 0.0, True),
]

PRODUCTS = [
    case("linear", "- d b0 b1 n k p", aten.linear.default, t(2, 4, 8), t(6, 8), t(6)),
    case("linear no bias", "- d b0 n k p", aten.linear.default, t(4, 8), t(6, 8)),
    case("linear vector", "- d n k p", aten.linear.default, t(8), t(6, 8), t(6)),
    case("addmm", "- d m n k p", aten.addmm.default, t(6), t(4, 8), t(8, 6)),
    case("addmm matrix", "m n k p", aten.addmm.default, t(4, 1), t(4, 8), t(8, 6), beta=2.0),
    case("baddbmm", "b m n k p", aten.baddbmm.default, t(2, 1, 6), t(2, 4, 8), t(2, 8, 6)),
    case("baddbmm alpha", "b m n k", aten.baddbmm.default, t(2, 4, 6), t(2, 4, 8), t(2, 8, 6), beta=0.5, alpha=3.0),
    case("mm", "m n k p", aten.mm.default, t(4, 8), t(8, 6)),
    case("bmm", "b0 m n k p", aten.bmm.default, t(2, 4, 8), t(2, 8, 6)),
    case("matmul", "b0 b1 m n k p", aten.matmul.default, t(2, 4, 4, 8), t(2, 4, 8, 6)),
    case("matmul broadcast", "b0 b1 m n k p", aten.matmul.default, t(2, 1, 4, 8), t(4, 8, 6)),
    case("matmul same", "b0 m n k p", aten.matmul.default, *(2 * [t(2, 4, 4)])),
    case("matmul vector", "b0 m k p", aten.matmul.default, t(2, 4, 8), t(8)),
    case("matmul vector left", "b0 n k p", aten.matmul.default, t(8), t(2, 8, 4)),
    case("dot", "k p", aten.matmul.default, t(8), t(8)),
    case("mv", "m k p", aten.mv.default, t(4, 8), t(8)),
    case("outer", "m n p", aten.outer.default, t(4), t(8)),
    case("einsum", "a b c d p", aten.einsum.default, "abc,acd->abd", [t(2, 4, 6), t(2, 6, 8)]),
    case("einsum sum", "a b c", aten.einsum.default, "ab,bc->", [t(2, 4), t(4, 6)]),
    case("einsum dots", "b0 i j k", aten.einsum.default, "...ij, ...jk", [t(2, 4, 6), t(2, 6, 8)]),
    case("einsum three", "a b c p", aten.einsum.default, "ab,bc,ac->ac", [t(2, 4), t(4, 6), t(2, 6)]),
    case("bilinear", "b0 n", aten.bilinear.default, t(4, 6), t(4, 8), t(2, 6, 8), t(2)),
]

CONVOLUTIONS = [
    case("conv1d", "n o c p", aten.conv1d.default, t(4, 6, 9), t(8, 6, 3), t(8)),
    case("conv2d", "n o c p", aten.conv2d.default, t(4, 6, 5, 5), t(8, 6, 3, 3), None, [2, 2], [1, 1]),
    case("conv2d same", "n o c", aten.conv2d.padding, t(4, 6, 5, 5), t(8, 6, 3, 3), t(8), [1, 1], "same"),
    case("conv2d unbatched", "o c p", aten.conv2d.default, t(6, 5, 5), t(8, 6, 3, 3), t(8)),
    case("depthwise", "n g", aten.conv2d.default, t(2, 8, 5, 5), t(8, 1, 3, 3), t(8), [1, 1], [0, 0], [1, 1], 8),
    case("conv groups of many", "n g", aten.conv2d.default, t(4, 16, 3, 3), t(8, 4, 2, 2), t(8), groups=4),
    case("conv groups of two", "n g", aten.conv1d.default, t(4, 8, 5), t(16, 4, 3), t(16), groups=2),
    case("depthwise kw", "n g", aten.conv1d.default, t(2, 8, 5), t(16, 1, 3), t(16), groups=8),
    case("grouped", "n", aten.conv2d.default, t(2, 8, 5, 5), t(8, 4, 3, 3), t(8), [1, 1], [0, 0], [1, 1], 2),
    case("conv3d", "n o c", aten.conv3d.default, t(2, 4, 3, 3, 3), t(6, 4, 2, 2, 2), t(6)),
    case("transposed", "n o c p", aten.conv_transpose2d.input, t(4, 6, 3, 3), t(6, 8, 2, 2), t(8), [2, 2]),
    case("convolution", "n o c", aten.convolution.default, t(4, 6, 5), t(8, 6, 3), t(8), *ONES, False, [0], 1),
    case(
        "convolution transposed",
        "n o c",
        aten.convolution.default,
        t(4, 6, 5),
        t(6, 8, 3),
        t(8),
        [1],
        [1],
        [1],
        True,
        [0],
        1,
    ),
    case("max_pool2d", "b0 b1", aten.max_pool2d.default, t(2, 4, 6, 6), [3, 3], [2, 2], [1, 1]),
    case("max_pool1d", "b0 b1", aten.max_pool1d.default, t(2, 4, 6), [2]),
    case("avg_pool2d", "b0 b1", aten.avg_pool2d.default, t(2, 4, 6, 6), [2, 2]),
    case("adaptive", "b0 b1", aten.adaptive_avg_pool2d.default, t(2, 4, 6, 6), [1, 1]),
    case("adaptive max", "b0 b1", aten.adaptive_max_pool2d.default, t(2, 4, 6, 6), [2, 2]),
    case("upsample", "b0 b1", aten.upsample_nearest2d.vec, t(2, 4, 3, 3), None, [2.0, 2.0]),
    case("bilinear up", "b0 b1", aten.upsample_bilinear2d.vec, t(2, 4, 3, 3), [6, 6], False, None),
    case("pixel_shuffle", "b0", aten.pixel_shuffle.default, t(2, 8, 3, 3), 2),
    case("unfold", "b0 b1", aten.im2col.default, t(2, 4, 6, 6), [2, 2], [1, 1], [0, 0], [2, 2]),
]


def qkv(heads: int = 4, kv: int = 4, q: int = 6, k: int = 6) -> list[Recipe]:
    return [t(2, heads, q, 4), t(2, kv, k, 4), t(2, kv, k, 8)]


SDPA = aten.scaled_dot_product_attention.default
ATTENTION = [
    case("sdpa", "- d b0 b1 q", SDPA, *qkv()),
    case("sdpa causal", "- d b0 b1", SDPA, *qkv(), None, 0.0, True),
    case("sdpa scale", "b0 b1 q", SDPA, *qkv(k=4), scale=0.3),
    case("sdpa mask", "b0 b1 q", SDPA, *qkv(), causal(2, 1, 6, 6)),
    case("sdpa shared mask", "b0 b1 q", SDPA, *qkv(), causal(6, 6)),
    case("sdpa bias", "b0 b1 q", SDPA, *qkv(), t(1, 4, 6, 6)),
    case("sdpa row mask", "b0 b1 q", SDPA, *qkv(), t(2, 1, 1, 6)),
    case("sdpa grouped", "b0 b1 q", SDPA, *qkv(8, 4), enable_gqa=True),
    case("sdpa grouped causal", "b0 b1", SDPA, *qkv(8, 2), is_causal=True, enable_gqa=True),
    case("sdpa 3d", "b0 q", SDPA, t(4, 6, 4), t(4, 6, 4), t(4, 6, 4)),
]

BN = aten.batch_norm.default
NORMS = [
    case("layer_norm", "- d b0 b1", aten.layer_norm.default, t(4, 6, 8), [8], t(8), t(8)),
    case("layer_norm two", "b0", aten.layer_norm.default, t(4, 6, 8), [6, 8], t(6, 8)),
    case("layer_norm plain", "b0", aten.layer_norm.default, t(4, 8), [8]),
    case("native_layer_norm", "b0", aten.native_layer_norm.default, t(4, 8), [8], t(8), t(8), 1e-5),
    case("rms_norm", "b0 b1", aten.rms_norm.default, t(4, 6, 8), [8], t(8), 1e-6),
    case("group_norm", "n c", aten.group_norm.default, t(4, 8, 3, 3), 4, t(8), t(8)),
    case("group_norm each", "n c", aten.group_norm.default, t(4, 8, 3, 3), 8, t(8), t(8)),
    case(
        "instance_norm",
        "n c",
        aten.instance_norm.default,
        t(4, 8, 3, 3),
        t(8),
        t(8),
        None,
        None,
        True,
        0.1,
        1e-5,
        False,
    ),
    case(
        "batch_norm",
        "- d n c s0",
        aten.batch_norm.default,
        t(4, 8, 2, 3),
        t(8),
        t(8),
        fixed(8),
        fixed(8),
        True,
        0.1,
        1e-5,
        False,
    ),
    case(
        "batch_norm flat",
        "n c",
        aten.batch_norm.default,
        t(4, 8),
        t(8),
        t(8),
        fixed(8),
        fixed(8),
        True,
        0.1,
        1e-5,
        False,
    ),
    case("batch_norm plain", "n c", BN, t(4, 8, 2), None, None, None, None, True, 0.1, 1e-5, False),
    case(
        "batch_norm eval",
        "n c s0",
        aten.batch_norm.default,
        t(4, 8, 2),
        t(8),
        t(8),
        fixed(8),
        fixed(8),
        False,
        0.1,
        1e-5,
        False,
    ),
    case("softmax", "b0 b1", aten.softmax.int, t(4, 6, 8), -1),
    case("softmax dtype", "b0 b2", aten.softmax.int, t(4, 6, 8), 1, torch.float64),
    case("safe_softmax", "b0", aten._safe_softmax.default, t(4, 8), -1),
    case("log_softmax", "b0", aten.log_softmax.int, t(4, 8), 1),
    case("normalize", "b0", aten.linalg_vector_norm.default, t(4, 8), 2, [-1], True),
    case("cosine_similarity scalar", "- d", aten.cosine_similarity.default, t(), t(), 0),
    case("cosine_similarity", "b0", aten.cosine_similarity.default, t(4, 8), t(4, 8), 1),
]

REDUCTIONS = [
    case("sum", "- d b0 b1 p", aten.sum.default, t(4, 8)),
    case("sum dim", "b0 b1 b2 p", aten.sum.dim_IntList, t(4, 6, 8), [-1, 0], True),
    case("sum bool", "b0 b1", aten.sum.dim_IntList, b(4, 8), [1]),
    case("sum dtype", "b0 b1", aten.sum.default, i(5, 4, 8), dtype=torch.float64),
    case("mean", "- d b0 b1 p", aten.mean.default, t(4, 8)),
    case("mean dim", "b0 b1 b2 p", aten.mean.dim, t(4, 6, 8), [1]),
    case("amax", "b0", aten.amax.default, t(4, 8), [-1], True),
    case("max", "- d", aten.max.default, t(4, 8)),
    case("max dim", "b0", aten.max.dim, t(4, 8), 1),
    case("argmax", "b0", aten.argmax.default, t(4, 8), -1),
    case("argmax flat", "-", aten.argmax.default, t(4, 8)),
    case("var", "b0", aten.var.correction, t(4, 8), [1], correction=0),
    case("std", "b0", aten.std.dim, t(4, 8), [1], True, True),
    case("var_mean", "b0", aten.var_mean.correction, t(4, 8), [1]),
    case("std whole", "- d", aten.std.default, t(4, 8)),
    case("any", "b1", aten.any.dim, b(4, 8), 0),
    case("all", "-", aten.all.default, b(4, 8)),
    case("logsumexp", "b0", aten.logsumexp.default, t(4, 8), [1]),
    case("prod", "b0", aten.prod.dim_int, t(4, 8), 1),
    case("norm", "b0", aten.norm.ScalarOpt_dim, t(4, 8), 2, [1]),
    case("cumsum", "b0 p", aten.cumsum.default, t(4, 8), -1),
    case("cumsum bool", "b0", aten.cumsum.default, b(4, 8), 1),
    case("cumprod", "b0", aten.cumprod.default, t(4, 8), 1),
    case("topk", "b0 b1", aten.topk.default, t(4, 6, 8), 3),
    case("sort", "b1", aten.sort.default, t(4, 8), 0),
    case("argsort", "b0", aten.argsort.default, t(4, 8)),
    case("kthvalue", "b0", aten.kthvalue.default, t(4, 8), 2),
    case("count_nonzero", "b0 b1", aten.count_nonzero.dim_IntList, i(2, 4, 8), [1]),
    case("tril", "b0 p", aten.tril.default, t(4, 6, 6)),
    case("flip", "b1 p", aten.flip.default, t(4, 8), [0]),
    case("roll", "b0 p", aten.roll.default, t(4, 8), [2], [1]),
    case("diff", "b0", aten.diff.default, t(4, 8), 1, -1, t(4, 1)),
    case("glu", "b0", aten.glu.default, t(4, 8)),
]

INDEXING = [
    case("embedding", "- d v e b0 b1", aten.embedding.default, t(8, 6), i(8, 4, 6)),
    case("embedding padding", "v e b0", aten.embedding.default, t(8, 6), i(8, 4, 6), 5),
    case("embedding padding 0", "v e b0", aten.embedding.default, t(8, 6), i(8, 4, 6), 0),
    case("embedding freq", "- d e", aten.embedding.default, t(8, 6), i(8, 4, 6), -1, True),
    case("gather", "b0 i1 p", aten.gather.default, t(4, 8), 1, i(8, 4, 6)),
    case("gather smaller", "i1", aten.gather.default, t(6, 8), 1, i(8, 4, 6)),
    case("index_select", "b0 i p", aten.index_select.default, t(4, 8), 1, i(8, 6)),
    case("index", "ib0 b1 p", aten.index.Tensor, t(6, 8), [i(6, 4)]),
    case("index two", "ib0 ib1 b2", aten.index.Tensor, t(6, 8, 4), [i(6, 4, 1), i(8, 1, 6)]),
    case("index later", "b0 ib0", aten.index.Tensor, t(4, 8, 3), [None, i(8, 6), i(3, 6)]),
    case("index apart", "b1 ib0", aten.index.Tensor, t(4, 8, 6), [i(4, 4), None, i(6, 4)]),
    case("slice_scatter", "b0 p", aten.slice_scatter.default, t(4, 8), t(4, 3), 1, 2, 5),
    case("select_scatter", "b1 p", aten.select_scatter.default, t(4, 8), t(8), 0, 2),
    case("scatter", "b0", aten.scatter.src, t(4, 8), 1, i(8, 4, 1), t(4, 1)),
    case("scatter value", "b0", aten.scatter.value, t(4, 8), 1, i(8, 4, 2), 1.0),
    case("scatter_add", "b0", aten.scatter_add.default, t(4, 8), 1, i(8, 4, 6), t(4, 6)),
    case("scatter_add sum", "i p", aten.scatter_add.default, t(4, 8), 0, i(4, 6, 8), t(6, 8)),
    case("index_add", "b1 i p", aten.index_add.default, t(4, 8), 0, i(4, 6), t(6, 8)),
    case("index_put add", "b1 ib0 p", aten.index_put.default, t(6, 8), [i(6, 4)], t(4, 8), True),
    case("index_put", "b1", aten.index_put.default, t(6, 8), [given(1, 3)], t(2, 8)),
    case("one_hot", "b0 b1", aten.one_hot.default, i(5, 4, 6), 5),
    case("take_along_dim", "b0 i1", aten.take_along_dim.default, t(4, 8), i(8, 4, 6), 1),
]

VIEWS = [
    case("view heads", "g0 g1 g2 p", aten.view.default, t(2, 4, 8), [2, 4, 4, 2]),
    case("view merge", "g0 g2 p", aten.view.default, t(2, 4, 8), [-1, 8]),
    case("view bool", "g0 g2", aten.view.default, b(2, 4, 8), [-1, 8]),
    case("view regroup", "g0", aten.reshape.default, t(6, 4), [4, 6]),
    case("view qkv", "g0 i2 p", aten.view.default, t(2, 4, 24), [2, 4, 3, 4, 2]),
    case("view scalar", "-", aten.view.default, t(1), []),
    case("unsafe_view", "g0 g2", aten._unsafe_view.default, t(2, 4, 8), [8, 2, 4]),
    case("view_as", "g0 g1", aten.view_as.default, t(4, 8), t(4, 2, 4)),
    case("reshape_as", "g0 g1", aten.reshape_as.default, t(4, 8), t(4, 2, 4)),
    case("flatten", "g0 g1 p", aten.flatten.using_ints, t(2, 4, 6, 8), 1, 2),
    case("unflatten", "g0 g1", aten.unflatten.int, t(4, 8), -1, [4, -1]),
    case("squeeze kept", "g0 g1", aten.squeeze.default, t(2, 4)),
    case("squeeze kept dim", "g0 g1", aten.squeeze.dim, t(2, 4), 0),
    case("unflatten qkv", "g0 i1", aten.unflatten.int, t(4, 24), -1, [3, 8]),
    case("unsqueeze", "g0 g1", aten.unsqueeze.default, t(4, 8), 1),
    case("squeeze", "g0 g2", aten.squeeze.dim, t(4, 1, 8), 1),
    case("squeeze dims", "g0 g2", aten.squeeze.dims, t(4, 1, 8), [1]),
    case("squeeze all", "g0 g2", aten.squeeze.default, t(4, 1, 8)),
    case("transpose", "b0 b1 b2 p", aten.transpose.int, t(2, 4, 8), 1, 2),
    case("permute", "b0 b1 b2 p", aten.permute.default, t(2, 4, 8), [2, 0, 1]),
    case("t", "b0 b1", aten.t.default, t(4, 8)),
    case("movedim", "b0 b1 b2", aten.movedim.int, t(2, 4, 8), 0, 2),
    case("mT", "b0 b1", aten.mT.default, t(4, 8)),
    case("expand", "b0 b1 b2 p", aten.expand.default, t(4, 1, 8), [4, 6, -1]),
    case("broadcast_to", "b0 b1 p", aten.broadcast_to.default, t(1, 8), [4, 8]),
    case("mH", "b0 b1", aten.mH.default, t(4, 8)),
    case("repeat nothing", "-", aten.repeat.default, t(0, 8), [4, 1]),
    case("repeat_interleave flat", "- d", aten.repeat_interleave.self_int, t(4, 8), 2, output_size=64),
    case("expand new", "b0 b1", aten.expand.default, t(8), [4, 8]),
    case("repeat", "b1 c0 p", aten.repeat.default, t(4, 8), [2, 1]),
    case("repeat one", "b0 b1 b2 p", aten.repeat.default, t(1, 8), [4, 6, 1]),
    case("repeat_interleave", "b0 b1 p", aten.repeat_interleave.self_int, t(2, 4, 8), 3, 1),
    case("repeat_interleave size", "b0 b1", aten.repeat_interleave.self_int, t(4, 8), 2, 0, output_size=8),
    case("select", "b0 b2 p", aten.select.int, t(2, 3, 8), 1, -1),
    case("unbind", "b1 b2 p", aten.unbind.int, t(3, 4, 8)),
    case("slice", "b0 p", aten.slice.Tensor, t(4, 8), 1, 2, 6),
    case("slice whole", "b0 b1 p", aten.slice.Tensor, t(4, 8), 1, 0, 8),
    case("slice step", "b0 p", aten.slice.Tensor, t(4, 8), 1, 0, 8, 2),
    case("narrow", "b0 p", aten.narrow.default, t(4, 8), 1, 2, 4),
    case("chunk", "b0 sections p", aten.chunk.default, t(4, 24), 3, -1),
    case("chunk uneven", "b0 sections", aten.chunk.default, t(4, 20), 3, -1),
    case("split", "b0 sections p", aten.split.Tensor, t(4, 24), 8, 1),
    case("split sizes", "b0 sections p", aten.split_with_sizes.default, t(4, 24), [16, 4, 4], 1),
    case("cat", "b0 p", aten.cat.default, [t(4, 8), t(4, 2)], -1),
    case("stack", "b0 b1 p", aten.stack.default, [t(4, 8), t(4, 8)], 1),
    case("pad", "b0 p", aten.pad.default, t(4, 8), [1, 2]),
    case("pad value", "b0", aten.pad.default, t(4, 8), [0, 1], "constant", -100.0),
    case("constant_pad_nd", "b0 p", aten.constant_pad_nd.default, t(4, 8), [0, 1, 0, 0]),
    case("pad reflect", "b0 b1 p", aten.pad.default, t(2, 4, 8), [2, 1], "reflect"),
    case("broadcast_tensors", "b0 b1 p", aten.broadcast_tensors.default, [t(4, 8), t(8)]),
    case("meshgrid", "-", aten.meshgrid.indexing, [t(4), t(6)], indexing="ij"),
    case("diagonal", "b0 p", aten.diagonal.default, t(4, 6, 6), 0, 1, 2),
    case("unfold dim", "b0", aten.unfold.default, t(4, 8), 1, 4, 2),
]

FACTORIES = [
    case("zeros", "b0 b1", aten.zeros.default, [4, 8], dtype=torch.float64),
    case("full", "b0 b1", aten.full.default, [4, 8], 2.0, dtype=torch.float64),
    case("new_zeros", "b0 b1", aten.new_zeros.default, t(4, 8), [4, 6]),
    case("new_ones", "b0 a0", aten.new_ones.default, i(4, 4, 8), [4, 6], dtype=torch.bool),
    case("new_full", "b0 b1", aten.new_full.default, t(4), [4, 6], 3.0),
    case("arange", "-", aten.arange.default, 8),
    case("arange step", "-", aten.arange.start_step, 2, 8, 2),
    case("scalar_tensor", "-", aten.scalar_tensor.default, 2.0, dtype=torch.float64),
    case("eye", "-", aten.eye.default, 4),
    case("linspace", "-", aten.linspace.default, 0, 1, 8),
]

CE = aten.cross_entropy_loss.default
LOSSES = [
    case("cross_entropy", "- d b0 class", CE, t(8, 6), labels(6, 8)),
    case("cross_entropy sum", "b0 class", CE, t(8, 6), labels(6, 8), None, 2),
    case("cross_entropy none", "b0 class", CE, t(8, 6), labels(6, 8), None, 0),
    case("cross_entropy ignore", "b0 class", CE, t(8, 6), i(6, 8), None, 1, 2),
    case("cross_entropy smooth", "b0 class", CE, t(8, 6), labels(6, 8), None, 1, -100, 0.2),
    case("cross_entropy smooth none", "b0 class", CE, t(8, 6), labels(6, 8), None, 0, -100, 0.2),
    case("cross_entropy weight", "b0", CE, t(8, 6), labels(6, 8), fixed(6), 1, -100, 0.2),
    case("cross_entropy dims", "b0 b2 class", CE, t(4, 6, 8), labels(6, 4, 8)),
    case("cross_entropy one", "class", CE, t(6), i(3)),
    case("cross_entropy soft", "b0", CE, t(8, 6), probability(8, 6)),
    case("cross_entropy soft dims", "b0 b2", CE, t(4, 6, 8), probability(4, 6, 8), None, 1, -100, 0.1),
    case("nll", "b0", aten.nll_loss_nd.default, t(8, 6), labels(6, 8)),
    case("nll dims", "b0 b2", aten.nll_loss_nd.default, t(4, 6, 8), labels(6, 4, 8), None, 1),
    case("nll weight", "b0", aten.nll_loss.default, t(8, 6), labels(6, 8), fixed(6), 1),
    case("nll sum", "b0", aten.nll_loss_nd.default, t(8, 6), labels(6, 8), None, 2),
    case("nll none", "b0", aten.nll_loss_nd.default, t(8, 6), labels(6, 8), None, 0),
    case("mse", "b0 b1", aten.mse_loss.default, t(4, 8), t(4, 8)),
    case("mse broadcast", "- d", aten.mse_loss.default, t(4, 8), t(4, 1)),
    case("mse none", "b0 b1", aten.mse_loss.default, t(4, 8), t(4, 8), 0),
    case("l1 sum", "b0 b1", aten.l1_loss.default, t(4, 8), t(4, 8), 2),
    case("smooth_l1", "b0 b1", aten.smooth_l1_loss.default, t(4, 8), t(4, 8)),
    case("huber", "b0 b1", aten.huber_loss.default, t(4, 8), t(4, 8)),
    case("bce", "b0 b1", aten.binary_cross_entropy_with_logits.default, t(4, 8), probability(4, 8), None, fixed(8)),
    case("bce plain", "b0 b1", aten.binary_cross_entropy.default, probability(4, 8), probability(4, 8)),
    case("kl", "b0 b1", aten.kl_div.default, t(4, 8), probability(4, 8), 2),
    case("hinge", "b0 b1", aten.hinge_embedding_loss.default, t(4, 8), sign(4, 8)),
    case("margin", "b0", aten.margin_ranking_loss.default, t(8), t(8), sign(8)),
    case("cosine", "b", aten.cosine_embedding_loss.default, t(4, 8), t(4, 8), sign(4)),
]

CASES = [
    *POINTWISE, *PRODUCTS, *CONVOLUTIONS, *ATTENTION, *NORMS, *REDUCTIONS, *INDEXING, *VIEWS, *FACTORIES, *LOSSES,
]  # fmt: skip
