"""Which rule an op has. Every rule here is proven by execution in tests/test_rules.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from shardplan.planner.leaf_op import LEAF
from shardplan.planner.mixture import MIXTURE, is_product
from shardplan.planner.placement import R, S
from shardplan.planner.rules import (
    indexing,
    losses,
    mixtures,
    pointwise,
    positions,
    products,
    reductions,
    spatial,
    views,
)
from shardplan.planner.rules.letters import split_letters
from shardplan.planner.rules.randomness import random_impl
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import infos, leaf_of, mutated

aten = torch.ops.aten
Rule = Callable[[fx.Node], list[Strategy]]


def factory(node: fx.Node) -> list[Strategy]:
    """full, zeros, new_ones, rand: every part of the result can be made on its own, and of an argument only the dtype
    and the device are read, so it may lie in any way."""
    result = infos(node)[0].shape
    letters: list[str | None] = [f"b{i}" for i in range(len(result))]
    found = split_letters(node, [[None] * len(s) for s in shapes(node)], [letters], impl=random_impl(node))
    for source in shapes(node)[:1]:
        for dim, extent in enumerate(source):
            found.append(Strategy(f"a{dim}", (S(dim),), (R,)))
            found += [Strategy(f"a{dim}", (S(dim),), (S(i),)) for i, size in enumerate(result) if size == extent > 1]
    return found


def sequence(node: fx.Node) -> list[Strategy]:
    """arange, eye, linspace, randperm: a part depends on where it is, so ranks make all of it and take theirs."""
    return []


def fused(node: fx.Node) -> list[Strategy]:
    """chunk, split: other dims pass; the split dim is sharded section by section."""
    return views.sections(node, argument(node, "dim", 0))


def select(node: fx.Node) -> list[Strategy]:
    """select, unbind."""
    return views.select(node, argument(node, "dim", 0))


def leaf(node: fx.Node) -> list[Strategy]:
    """A submodule kept whole: what running it has proven (see `LeafNote.steady`)."""
    note = leaf_of(node)
    return list(note.splits) if note is not None and note.steady else []


def stack(node: fx.Node) -> list[Strategy]:
    return views.stack(node, argument(node, "dim", 0))


def flip(node: fx.Node) -> list[Strategy]:
    """flip, roll: the dims that are reordered stay whole (all of them where none is named)."""
    return views.other_dims(node, argument(node, "dims") or range(len(shapes(node)[0])), linear=True)


def triangle(node: fx.Node) -> list[Strategy]:
    return views.other_dims(node, (-1, -2), linear=True)


def repeat_interleave(node: fx.Node) -> list[Strategy]:
    return views.other_dims(node, (), linear=True) if argument(node, "dim") is not None else []


def view_as_real(node: fx.Node) -> list[Strategy]:
    letters: list[str | None] = [f"b{i}" for i in range(len(shapes(node)[0]))]
    return split_letters(node, [letters], [[*letters, None]])


def view_as_complex(node: fx.Node) -> list[Strategy]:
    letters: list[str | None] = [f"b{i}" for i in range(len(shapes(node)[0]) - 1)]
    return split_letters(node, [[*letters, None]], [letters])


def _table(entries: Iterable[tuple[Rule, str]]) -> dict[Any, Rule]:
    """Rule -> names of ops, ``name`` for the default overload or ``name.overload``. Names that the installed torch does
    not have are left out."""
    found: dict[Any, Rule] = {}
    for rule, names in entries:
        for name in names.split():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet, None), overload or "default", None)
            if op is not None:
                found[op] = rule
    return found


RULES: dict[Any, Rule] = _table(
    [
        # products
        (products.linear, "linear"),
        (products.addmm, "addmm"),
        (products.baddbmm, "baddbmm"),
        (products.matmul, "matmul mm bmm mv dot"),
        (products.outer, "outer"),
        (products.einsum, "einsum"),
        (products.bilinear, "bilinear"),
        (products.cdist, "cdist"),
        (products.grouped_mm, "_grouped_mm"),
        (products.convolution, "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding convolution"),
        (products.convolution, "conv_transpose1d conv_transpose2d.input conv_transpose3d.input"),
        (products.attention, "scaled_dot_product_attention"),
        (products.recurrent, "lstm.input gru.input rnn_tanh.input rnn_relu.input"),
        # normalisation, reductions
        (reductions.layer_norm, "layer_norm native_layer_norm rms_norm"),
        (reductions.group_norm, "group_norm"),
        (reductions.instance_norm, "instance_norm"),
        (reductions.batch_norm, "batch_norm"),
        (reductions.along_dim, "softmax.int _softmax log_softmax.int _log_softmax cumprod logcumsumexp cummax cummin"),
        (reductions.along_dim, "topk sort sort.stable argsort argsort.stable glu fft_fft fft_ifft fft_rfft fft_irfft"),
        (reductions.along_dim, "diff _safe_softmax fft_hfft fft_ihfft"),
        (reductions.transformed, "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn"),
        (reductions.transformed, "fft_fftshift fft_ifftshift _fft_c2c _fft_r2c _fft_c2r"),
        (reductions.along_dim_linear, "cumsum cat concat"),
        (reductions.sum_, "sum sum.dim_IntList"),
        (reductions.mean, "mean mean.dim"),
        (reductions.count, "count_nonzero count_nonzero.dim_IntList nansum"),
        (reductions.other_reduction, "amax amin max.dim min.dim max min argmax argmin aminmax"),
        (reductions.other_reduction, "var var.dim var.correction std std.dim std.correction var_mean.correction"),
        (reductions.other_reduction, "std_mean.correction any any.dim any.dims all all.dim all.dims logsumexp"),
        (reductions.other_reduction, "prod prod.dim_int linalg_vector_norm norm.ScalarOpt_dim norm.Scalar"),
        (reductions.other_reduction, "kthvalue median.dim nanmedian.dim mode var_mean var_mean.dim std_mean"),
        (reductions.other_reduction, "std_mean.dim"),
        (reductions.cosine_similarity, "cosine_similarity"),
        # indexing
        (indexing.embedding, "embedding"),
        (positions.embedding_bag, "embedding_bag embedding_bag.padding_idx"),
        (indexing.gather, "gather take_along_dim"),
        (indexing.scatter, "scatter.src scatter.value scatter_add scatter_reduce.two"),
        (indexing.overwrite, "slice_scatter select_scatter"),
        (indexing.index_select, "index_select"),
        (indexing.index_add, "index_add"),
        (indexing.index, "index.Tensor"),
        (indexing.index_put, "index_put"),
        (indexing.one_hot, "one_hot"),
        (indexing.searchsorted, "searchsorted.Tensor"),
        (pointwise.lookup, "isin.Tensor_Tensor bucketize.Tensor"),
        (pointwise.prelu, "prelu"),
        (pointwise.feature_dropout, "feature_dropout feature_alpha_dropout"),
        # losses
        (losses.cross_entropy, "cross_entropy_loss"),
        (losses.nll, "nll_loss nll_loss_nd nll_loss2d"),
        (losses.elementwise_loss, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div"),
        (losses.elementwise_loss, "binary_cross_entropy_with_logits soft_margin_loss hinge_embedding_loss"),
        (losses.elementwise_loss, "margin_ranking_loss poisson_nll_loss"),
        (losses.pairwise_loss, "cosine_embedding_loss triplet_margin_loss"),
        # spatial
        (spatial.windows, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d"),
        (spatial.windows, "max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices"),
        (spatial.windows, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
        (spatial.windows, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
        (spatial.windows, "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec"),
        (spatial.windows, "upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec"),
        (spatial.windows, "upsample_bicubic2d.vec _upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec"),
        (spatial.shuffle, "pixel_shuffle pixel_unshuffle channel_shuffle"),
        (spatial.im2col, "im2col"),
        (spatial.grid_sample, "grid_sampler"),
        (spatial.affine_grid, "affine_grid_generator"),
        (spatial.pad, "pad constant_pad_nd"),
        # views
        (select, "select.int unbind.int"),
        (fused, "chunk split.Tensor split.sizes split_with_sizes"),
        (stack, "stack"),
        (flip, "flip roll"),
        (triangle, "tril triu"),
        (views.slice_, "slice.Tensor"),
        (views.narrow, "narrow"),
        (views.expand, "expand broadcast_to"),
        (views.repeat, "repeat tile"),
        (repeat_interleave, "repeat_interleave.self_int"),
        (views.broadcast_tensors, "broadcast_tensors"),
        (views.meshgrid, "meshgrid meshgrid.indexing"),
        (views.diagonal, "diagonal"),
        (views.windows, "unfold"),
        (view_as_real, "view_as_real"),
        (view_as_complex, "view_as_complex"),
        # made from nothing
        (factory, "full zeros ones empty.memory_format new_zeros new_ones new_full new_empty"),
        (factory, "rand randn randint randint.low normal.float_float"),
        (indexing.multinomial, "multinomial"),
        (sequence, "arange arange.start arange.start_step scalar_tensor eye eye.m linspace tril_indices triu_indices"),
        (sequence, "randperm"),
    ]
)
RULES |= dict.fromkeys(views.RESHAPES, views.reshape)
RULES |= dict.fromkeys(views.PERMUTES, views.permute)
RULES[LEAF] = leaf
RULES[MIXTURE] = mixtures.mixture


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of an op, or None."""
    if node.target in RULES:
        return RULES[node.target]
    if is_product(node.target):
        return products.grouped_mm
    return pointwise.pointwise if pointwise.is_pointwise(node.target) else None


def unsplittable(node: fx.Node) -> bool:
    """Ops whose results are computed whole on every rank: those that write to buffers, normalisation apart."""
    return bool(mutated(node)) and node.target is not aten.batch_norm.default
