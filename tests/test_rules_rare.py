"""Dimension rules of rarer ops, by execution, and proof that no op has a rule that was never executed."""

from __future__ import annotations

import pytest
import torch

from shardplan.planner.placement import Mesh
from shardplan.planner.rules import has_rule, strategies
from shardplan.planner.rules.families import RULES
from tests.execution import can_run, frozen, op_of, verify
from tests.rule_cases import CASES as COMMON
from tests.rule_cases import Recipe, b, build, case, fixed, i, pos, probability, rising, t
from tests.test_rules_positions import CASES as POSITIONS

aten = torch.ops.aten
F64 = torch.float64


def c(*shape: int) -> Recipe:
    """Complex numbers, without a gradient."""
    return Recipe(lambda: torch.randn(shape, dtype=torch.complex128))


def rows(*shape: int) -> Recipe:
    """Sorted along the last dim."""
    return Recipe(lambda: torch.randn(shape, dtype=F64).sort(-1).values)


def signs(*shape: int) -> Recipe:
    """Without a gradient."""
    return Recipe(lambda: frozen(torch.randn(shape, dtype=F64).sign()))


def grid(*shape: int) -> Recipe:
    return Recipe(lambda: torch.rand(shape, dtype=F64) * 1.6 - 0.8)


POINTWISE = [
    case("and scalar", "b0 b1", aten.__and__.Scalar, i(9, 4, 8), 3),
    case("or scalar", "b0", aten.__or__.Scalar, i(9, 4, 8), 3),
    case("or", "b0 b1", aten.__or__.Tensor, b(4, 8), b(8)),
    case("xor", "b0 b1", aten.__xor__.Tensor, b(4, 8), b(4, 1)),
    case("to_copy", "b0 p", aten._to_copy.default, i(9, 4, 8), dtype=F64),
    case("to device", "b0 p", aten.to.device, t(4, 8), torch.device("cpu"), F64),
    case("to layout", "b0 p", aten.to.dtype_layout, t(4, 8), dtype=F64),
    case("to other", "b0", aten.to.other, i(9, 4, 8), t(4, 8)),
    case("bitwise_not", "b0", aten.bitwise_not.default, i(9, 4, 8)),
    case("complex", "b0 b1", aten.complex.default, t(4, 8), t(4, 8)),
    case("polar", "b0", aten.polar.default, pos(4, 8), t(4, 8)),
    case("real", "b0", aten.real.default, c(4, 8)),
    case("imag", "b0", aten.imag.default, c(4, 8)),
    case("conj", "b0", aten.conj.default, c(4, 8)),
    case("mul complex", "b0 p", aten.mul.Tensor, c(4, 8), c(4, 1)),
    case("copy", "b0 b1", aten.copy.default, i(9, 4, 8), i(9, 8)),
    case("div scalar", "b0 p", aten.div.Scalar, t(4, 8), 3.0),
    case("mul scalar", "b0 p", aten.mul.Scalar, t(4, 8), 3.0),
    case("hardswish", "b0", aten.hardswish.default, t(4, 8)),
    case("isin scalar", "b0", aten.isin.Tensor_Scalar, i(9, 4, 8), 3),
    case("lift_fresh_copy", "b0", aten.lift_fresh_copy.default, t(4, 8)),
    case("log_sigmoid", "b0", aten.log_sigmoid.default, t(4, 8)),
    case("logit", "b0", aten.logit.default, probability(4, 8)),
    case("ones_like", "b0 b1", aten.ones_like.default, t(4, 8)),
    case("positive", "b0 p", aten.positive.default, t(4, 8)),
    case("rsub scalar", "b0", aten.rsub.Scalar, t(4, 8), 2.0, 3.0),
    case("where scalars", "b0 b1", aten.where.Scalar, b(4, 8), 2.0, 3.0),
    case("addcdiv", "b0 b1", aten.addcdiv.default, t(4, 8), t(4, 1), pos(8), value=0.5),
    case("lerp scalar", "b0 b1", aten.lerp.Scalar, t(4, 8), t(8), 0.3),
    case("fmod", "b0", aten.fmod.Scalar, t(4, 8), 2.0),
    case("remainder", "b0 b1", aten.remainder.Tensor, t(4, 8), pos(8)),
    case("atan2", "b0 b1", aten.atan2.default, t(4, 8), t(8)),
    case("hypot", "b0 b1", aten.hypot.default, t(4, 8), t(4, 1)),
    case("erf", "b0", aten.erf.default, t(4, 8)),
    case("leaky_relu", "b0", aten.leaky_relu.default, t(4, 8), 0.2),
    case("elu", "b0", aten.elu.default, t(4, 8)),
    case("hardtanh", "b0", aten.hardtanh.default, t(4, 8)),
    case("mish", "b0", aten.mish.default, t(4, 8)),
    case("nan_to_num", "b0", aten.nan_to_num.default, t(4, 8)),
    case("threshold", "b0", aten.threshold.default, t(4, 8), 0.1, 2.0),
    case("logaddexp", "b0 b1", aten.logaddexp.default, t(4, 8), t(8)),
    case("xlogy", "b0 b1", aten.xlogy.Tensor, t(4, 8), pos(8)),
    case("cumulative shift", "b0 b1", aten.__lshift__.Scalar, i(9, 4, 8), 1),
    case("rsqrt", "b0", aten.rsqrt.default, pos(4, 8)),
    case("sigmoid", "b0", aten.sigmoid.default, t(4, 8)),
]

ALONG = [
    case("softmax plain", "b0 b1", aten._softmax.default, t(4, 6, 8), -1, False),
    case("log_softmax plain", "b0 b2", aten._log_softmax.default, t(4, 6, 8), 1, False),
    case("all dim", "b0", aten.all.dim, b(4, 8), 1),
    case("all dims", "b0", aten.all.dims, b(4, 6, 8), [1, 2]),
    case("any flat", "-", aten.any.default, b(4, 8)),
    case("any dims", "b1", aten.any.dims, b(4, 6, 8), [0, 2]),
    case("amin", "b1", aten.amin.default, t(4, 8), [0]),
    case("aminmax", "b0", aten.aminmax.default, t(4, 8), dim=1),
    case("aminmax flat", "-", aten.aminmax.default, t(4, 8)),
    case("argmin", "b0", aten.argmin.default, t(4, 8), 1, True),
    case("argsort stable", "b0", aten.argsort.stable, t(4, 8), stable=True, dim=1),
    case("sort stable", "b1", aten.sort.stable, t(4, 8), stable=True, dim=0),
    case("concat", "b0 p", aten.concat.default, [t(4, 8), t(4, 6)], 1),
    case("count_nonzero", "b0 b1", aten.count_nonzero.default, i(2, 4, 8)),
    case("cummax", "b0", aten.cummax.default, t(4, 8), 1),
    case("cummin", "b1", aten.cummin.default, t(4, 8), 0),
    case("logcumsumexp", "b0", aten.logcumsumexp.default, t(4, 8), 1),
    case("median", "b0", aten.median.dim, t(4, 8), 1),
    case("mode", "b0", aten.mode.default, t(4, 8), 1),
    case("min", "-", aten.min.default, t(4, 8)),
    case("min dim", "b0", aten.min.dim, t(4, 8), 1),
    case("norm all", "-", aten.norm.Scalar, t(4, 8), 2),
    case("prod all", "-", aten.prod.default, t(4, 8)),
    case("std correction", "b0", aten.std.correction, t(4, 8), [1], correction=1),
    case("std_mean", "b0", aten.std_mean.correction, t(4, 8), [1]),
    case("var all", "- d", aten.var.default, t(4, 8)),
    case("var dim", "b0", aten.var.dim, t(4, 8), [1]),
    case("vector norm flat", "-", aten.linalg_vector_norm.default, t(4, 8)),
    case("vector norm one", "b1", aten.linalg_vector_norm.default, t(4, 8), 1, [0]),
    case("sum nothing", "b0 b1", aten.sum.dim_IntList, t(4, 8), []),
    case("mean cast", "b0 b1", aten.mean.dim, t(4, 8), [1], True, dtype=F64),
    case("fft", "b0", aten.fft_fft.default, c(4, 8)),
    case("ifft", "b0", aten.fft_ifft.default, c(4, 8)),
    case("rfft", "b0", aten.fft_rfft.default, t(4, 8)),
    case("irfft", "b0", aten.fft_irfft.default, c(4, 5)),
    case("triu", "b0 p", aten.triu.default, t(4, 6, 6), 1),
    case("searchsorted", "b0", aten.searchsorted.Tensor, rows(4, 6), t(4, 8)),
    case("searchsorted row", "b0 b1", aten.searchsorted.Tensor, rising(6), t(4, 8)),
    case("scatter_reduce", "b0", aten.scatter_reduce.two, t(4, 8), 1, i(8, 4, 6), t(4, 6), "amax"),
    case("scatter_reduce mean", "b1", aten.scatter_reduce.two, t(4, 8), 0, i(4, 6, 8), t(6, 8), "mean"),
    case("index mask", "- d", aten.index.Tensor, t(4, 8), [b(4)]),
    case("index_put mask", "b0 b1", aten.index_put.default, t(4, 8), [b(4, 8)], pos()),
    case("index_put one", "b1", aten.index_put.default, t(6, 8), [i(6, 4)], t(1, 8), True),
    case("index_add scaled", "b1 i", aten.index_add.default, t(4, 8), 0, i(4, 6), t(6, 8), alpha=2.0),
    case("gather scalar dim", "- d", aten.gather.default, t(8), 0, i(8, 6)),
]

PRODUCTS = [
    case("dot", "k p", aten.dot.default, t(8), t(8)),
    case("cdist", "b0 m n", aten.cdist.default, t(2, 4, 3), t(2, 8, 3)),
    case("addmm beta", "m n k p", aten.addmm.default, t(4, 6), t(4, 8), t(8, 6), beta=0.5, alpha=2.0),
    case("einsum implicit", "i j k", aten.einsum.default, "ij,jk", [t(2, 4), t(4, 6)]),
    case("einsum diagonal", "- d", aten.einsum.default, "ii->i", [t(4, 4)]),
    case("einsum one", "a b", aten.einsum.default, "ab->ba", [t(4, 6)]),
    case("conv1d same", "n o c", aten.conv1d.padding, t(4, 6, 9), t(8, 6, 3), t(8), [1], "same"),
    case("conv3d valid", "n o c", aten.conv3d.padding, t(2, 4, 3, 3, 3), t(6, 4, 2, 2, 2), t(6), [1] * 3, "valid"),
    case("depthwise same", "n g", aten.conv2d.padding, t(2, 8, 5, 5), t(8, 1, 3, 3), t(8), [1, 1], "same", [1, 1], 8),
    case("transposed 1", "n o c", aten.conv_transpose1d.default, t(4, 6, 5), t(6, 8, 3), t(8), [2]),
    case("transposed 3", "n o c", aten.conv_transpose3d.input, t(2, 4, 2, 2, 2), t(4, 6, 2, 2, 2), t(6)),
    case(
        "transposed groups", "n g", aten.conv_transpose2d.input,
        t(2, 8, 3, 3), t(8, 1, 2, 2), t(8), [2, 2], [0, 0], [0, 0], 8,
    ),
    case(
        "lstm", "- d b", aten.lstm.input,
        t(3, 4, 6), [t(1, 4, 8), t(1, 4, 8)], [t(32, 6), t(32, 8), t(32), t(32)], True, 1, 0.0, True, False, False,
    ),
    case(
        "lstm two", "b", aten.lstm.input,
        t(4, 3, 6), [t(4, 4, 8), t(4, 4, 8)],
        [*2 * [t(32, 6), t(32, 8), t(32), t(32)], *2 * [t(32, 16), t(32, 8), t(32), t(32)]],
        True, 2, 0.0, True, True, True,
    ),
    case(
        "gru", "- d b", aten.gru.input,
        t(3, 4, 6), t(1, 4, 8), [t(24, 6), t(24, 8), t(24), t(24)], True, 1, 0.0, True, False, False,
    ),
    case(
        "rnn tanh", "b", aten.rnn_tanh.input,
        t(3, 4, 6), t(1, 4, 8), [t(8, 6), t(8, 8), t(8), t(8)], True, 1, 0.0, True, False, False,
    ),
    case(
        "rnn relu", "b", aten.rnn_relu.input,
        t(4, 3, 6), t(1, 4, 8), [t(8, 6), t(8, 8)], False, 1, 0.0, True, False, True,
    ),
]  # fmt: skip

SPATIAL = [
    case("adaptive 1", "b0 b1", aten.adaptive_avg_pool1d.default, t(2, 4, 6), [2]),
    case("adaptive 3", "b0 b1", aten.adaptive_avg_pool3d.default, t(2, 4, 2, 2, 2), [1, 1, 1]),
    case("adaptive max 1", "b0 b1", aten.adaptive_max_pool1d.default, t(2, 4, 6), [2]),
    case("adaptive max 3", "b0 b1", aten.adaptive_max_pool3d.default, t(2, 4, 2, 2, 2), [1, 1, 1]),
    case("avg 1", "b0 b1", aten.avg_pool1d.default, t(2, 4, 6), [2]),
    case("avg 3", "b0 b1", aten.avg_pool3d.default, t(2, 4, 2, 2, 2), [2, 2, 2]),
    case("max 1 indices", "b0 b1", aten.max_pool1d_with_indices.default, t(2, 4, 6), [2]),
    case("max 2 indices", "b0 b1", aten.max_pool2d_with_indices.default, t(2, 4, 6, 6), [2, 2]),
    case("max 3", "b0 b1", aten.max_pool3d.default, t(2, 4, 2, 2, 2), [2, 2, 2]),
    case("max 3 indices", "b0 b1", aten.max_pool3d_with_indices.default, t(2, 4, 2, 2, 2), [2, 2, 2]),
    case("max unbatched", "b0", aten.max_pool2d.default, t(4, 6, 6), [2, 2]),
    case("nearest 1", "b0 b1", aten.upsample_nearest1d.vec, t(2, 4, 3), None, [2.0]),
    case("nearest 3", "b0 b1", aten.upsample_nearest3d.vec, t(2, 4, 2, 2, 2), [4, 4, 4], None),
    case("exact", "b0 b1", aten._upsample_nearest_exact2d.vec, t(2, 4, 3, 3), [6, 6], None),
    case("linear", "b0 b1", aten.upsample_linear1d.vec, t(2, 4, 3), [6], False, None),
    case("trilinear", "b0 b1", aten.upsample_trilinear3d.vec, t(2, 4, 2, 2, 2), [3, 3, 3], True, None),
    case("bicubic", "b0 b1", aten.upsample_bicubic2d.vec, t(2, 4, 4, 4), [6, 6], False, None),
    case("antialias", "b0 b1", aten._upsample_bilinear2d_aa.vec, t(2, 4, 6, 6), [3, 3], False, None),
    case("pixel_unshuffle", "b0", aten.pixel_unshuffle.default, t(4, 2, 4, 4), 2),
    case("channel_shuffle", "b0", aten.channel_shuffle.default, t(4, 8, 2, 2), 2),
    case("im2col", "b0 b1", aten.im2col.default, t(2, 4, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
    case("grid_sampler", "n c", aten.grid_sampler.default, t(2, 4, 4, 4), grid(2, 4, 4, 2), 0, 0, False),
    case("affine_grid", "n p", aten.affine_grid_generator.default, t(2, 2, 3), [2, 4, 4, 6], False),
    case("affine_grid volumes", "n p", aten.affine_grid_generator.default, t(4, 3, 4), [4, 1, 2, 4, 6], True),
    case("grid_sampler other", "n c", aten.grid_sampler.default, t(2, 4, 4, 6), grid(2, 2, 8, 2), 0, 0, False),
]

VIEWS = [
    case("moveaxis", "b0 b1 b2", aten.moveaxis.int, t(2, 4, 8), 2, 0),
    case("moveaxis list", "b0 b1 b2", aten.moveaxis.intlist, t(2, 4, 8), [0, 1], [2, 0]),
    case("movedim list", "b0 b1 b2", aten.movedim.intlist, t(2, 4, 8), [0, 1], [1, 2]),
    case("swapaxes", "b0 b1 b2", aten.swapaxes.default, t(2, 4, 8), 0, -1),
    case("swapdims", "b0 b1 b2", aten.swapdims.default, t(2, 4, 8), 0, 1),
    case("numpy_T", "b0 b1 b2", aten.numpy_T.default, t(2, 4, 8)),
    case("ravel", "g0", aten.ravel.default, t(4, 8)),
    case("meshgrid plain", "-", aten.meshgrid.default, [t(4), t(6)]),
    case("split sizes", "b0 sections", aten.split.sizes, t(4, 24), [8, 16], 1),
    case("view_as_real", "b0 b1", aten.view_as_real.default, c(4, 8)),
    case("view_as_complex", "b0 b1", aten.view_as_complex.default, t(4, 8, 2)),
    case("stack last", "b0 b1 p", aten.stack.default, [t(4, 8), t(4, 8), t(4, 8)], -1),
    case("unsqueeze last", "g0 g1", aten.unsqueeze.default, t(4, 8), -1),
    case("select first", "b1 b2", aten.select.int, t(3, 4, 8), 0, 1),
    case("expand all", "b0 b1 p", aten.expand.default, t(), [4, 8]),
    case("slice negative", "b0", aten.slice.Tensor, t(4, 8), 1, -4),
    case("slice open", "b1", aten.slice.Tensor, t(4, 8), 0, 1),
    case("repeat more", "b1 b2", aten.repeat.default, t(4, 8), [6, 1, 1]),
    case("cat three", "b1 p", aten.cat.default, [t(2, 8), t(4, 8), t(2, 8)]),
]

MADE = [
    case("ones", "b0 b1", aten.ones.default, [4, 8], dtype=F64),
    case("arange start", "-", aten.arange.start, 2, 10),
    case("eye", "-", aten.eye.m, 4, 6),
    case("tril_indices", "-", aten.tril_indices.default, 4, 4),
    case("triu_indices", "-", aten.triu_indices.default, 4, 4),
]

LOSSES = [
    case("nll 2d", "b0 b2 b3", aten.nll_loss2d.default, t(4, 6, 2, 8), i(6, 4, 2, 8), None, 1, -100),
    case("poisson", "b0 b1", aten.poisson_nll_loss.default, t(4, 8), pos(4, 8), True, False, 1e-8, 1),
    case("soft_margin", "b0 b1", aten.soft_margin_loss.default, t(4, 8), signs(4, 8)),
    case("triplet", "b", aten.triplet_margin_loss.default, t(4, 8), t(4, 8), t(4, 8)),
    case("triplet sum", "b", aten.triplet_margin_loss.default, *3 * [t(4, 8)], reduction=2),
    case("bce weight", "b0 b1", aten.binary_cross_entropy.default, probability(4, 8), probability(4, 8), fixed(4, 8)),
    case("kl mean", "b0 b1", aten.kl_div.default, t(4, 8), probability(4, 8), 1, log_target=True),
]


def single(*shape: int) -> Recipe:
    return Recipe(lambda: torch.randn(shape))


def ends(*values: int) -> Recipe:
    return Recipe(lambda: torch.tensor(values, dtype=torch.int32))


GMM = aten._grouped_mm.default
GROUPED = [
    case("grouped rows", "n k p", GMM, single(16, 16), single(4, 16, 32), ends(2, 6, 10, 16)),
    case("grouped columns", "m k p", GMM, single(4, 8, 16), single(16, 32), ends(8, 16, 24, 32)),
    case("grouped sums", "m n p", GMM, single(32, 16), single(16, 32), ends(4, 8, 12, 16)),
    case("grouped batches", "g m k n p", GMM, single(4, 8, 16), single(4, 16, 16)),
]

TRANSFORMS = [
    case("hfft", "b1", aten.fft_hfft.default, c(4, 8), None, 0),
    case("ihfft", "b0", aten.fft_ihfft.default, t(4, 8)),
    case("fft2", "b0 p", aten.fft_fft2.default, t(4, 6, 8)),
    case("ifft2", "b1 p", aten.fft_ifft2.default, c(4, 8, 6), None, [0, 2]),
    case("rfft2", "b0 p", aten.fft_rfft2.default, t(4, 6, 8)),
    case("irfft2", "b0 p", aten.fft_irfft2.default, c(4, 6, 5), [6, 8]),
    case("fftn", "b0 p", aten.fft_fftn.default, t(4, 6, 8), [6, 8]),
    case("fftn all", "p", aten.fft_fftn.default, t(4, 8)),
    case("ifftn", "b1", aten.fft_ifftn.default, c(4, 8, 3), None, [0, -1]),
    case("rfftn", "b0 b1", aten.fft_rfftn.default, t(4, 8, 6), None, [2]),
    case("irfftn", "b0", aten.fft_irfftn.default, c(4, 3, 5), [3, 8]),
    case("fftshift", "b0 p", aten.fft_fftshift.default, t(4, 8), [1]),
    case("ifftshift", "p", aten.fft_ifftshift.default, t(4, 8)),
    case("c2c", "b0", aten._fft_c2c.default, c(4, 8), [1], 0, True),
    case("r2c", "b0 p", aten._fft_r2c.default, t(4, 8), [1], 0, True),
    case("c2r", "b0", aten._fft_c2r.default, c(4, 5), [1], 2, 8),
    case("nanmedian", "b0", aten.nanmedian.dim, t(4, 8), 1),
    case("var_mean dim", "b0", aten.var_mean.dim, t(4, 8), [1]),
    case("var_mean whole", "- d", aten.var_mean.default, t(4, 8)),
    case("std_mean dim", "b1", aten.std_mean.dim, t(4, 8), [0], True, True),
    case("std_mean whole", "- d", aten.std_mean.default, t(4, 8)),
    case("nansum", "b0 b1", aten.nansum.default, t(4, 8), [1]),
    case("tile", "b1 p", aten.tile.default, t(4, 8), [2, 1]),
    case("tile few", "b0", aten.tile.default, t(4, 8), [2]),
    case("tile more", "b0 b2", aten.tile.default, t(4, 8), [6, 1, 1]),
    case("matrix_H", "b0 b1", aten.matrix_H.default, t(4, 8)),
    case("adjoint", "b0 b1 b2", aten.adjoint.default, t(4, 6, 8)),
    case("t_copy", "b0 b1", aten.t_copy.default, t(4, 8)),
    case("transpose_copy", "b0 b1", aten.transpose_copy.int, t(4, 8), 0, 1),
    case("permute_copy", "b0 b1", aten.permute_copy.default, t(4, 8), [1, 0]),
]

CASES = [*GROUPED, *TRANSFORMS, *POINTWISE, *ALONG, *PRODUCTS, *SPATIAL, *VIEWS, *MADE, *LOSSES]


@pytest.mark.parametrize("names, target, args, kwargs", [x[1:] for x in CASES], ids=[x[0] for x in CASES])
def test_rule(names, target, args, kwargs):
    torch.manual_seed(0)
    made: dict[Recipe, torch.Tensor] = {}
    args, kwargs = build(args, made), build(kwargs, made)
    op = op_of(target, *args, **kwargs)
    assert has_rule(op.node)
    missing = set(names.split()) - {s.name for s in strategies(op.node)}
    assert not missing, f"no strategy {missing} among {[str(s) for s in strategies(op.node)]}"
    for grads in dict.fromkeys([None, tuple(k == 0 for k in range(len(op.values)))]):
        op = op_of(target, *args, grads=grads, **kwargs)
        for strategy in strategies(op.node, inner=True):
            for size in (2, 4):
                mesh = Mesh(("tp",), (size,))
                if can_run(op, {"tp": strategy}, mesh):
                    verify(op, {"tp": strategy}, mesh)


# Their results are random or not defined; tests/test_rules_pairs.py runs those that draw.
NO_DEFINITE_RESULT = {
    "feature_alpha_dropout", "feature_dropout", "empty", "new_empty", "rand", "randn", "randint", "randperm",
    "multinomial", "normal",
}  # fmt: skip


def test_every_rule_is_executed():
    executed = {x[2] for x in [*COMMON, *CASES, *POSITIONS]}
    left = {op for op in set(RULES) - executed if op.namespace == "aten"}
    assert not {str(op) for op in left if op._opname not in NO_DEFINITE_RESULT}
