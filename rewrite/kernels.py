"""Local implementations of ops that are not themselves on a rank: called by generated stage code with the communicator.

=====================  =======================================================  ====================================
`Strategy.impl`        when                                                     function
=====================  =======================================================  ====================================
``vocab_embedding``    the vocabulary is split                                  `vocab_embedding` (result: summand)
``cross_entropy``      tokens are split (mean), or classes are                  `cross_entropy`
``nll_loss``           tokens are split                                         `nll_loss`
``batch_norm``         samples or positions are split, in training              `batch_norm`
``batch_norm_replica`` the same, with statistics of each part                   `batch_norm`
``random``             the op draws (see `rules.randomness`)                    `rewrite.random_ops`
=====================  =======================================================  ====================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from shardplan.rewrite.comm import Comm

aten = torch.ops.aten


def vocab_embedding(
    comm: Comm, axis: str, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int = -1
) -> torch.Tensor:
    """Rows of a vocabulary split over `axis`: zeros where another rank has the row.

    weight: [vocab / n, dim]; ids: int [...], global; padding_idx: global, its row gets no gradient. -> [..., dim].
    """
    rows = weight.shape[0]
    local = ids - comm.index(axis) * rows
    elsewhere = (local < 0) | (local >= rows)
    padding = padding_idx - comm.index(axis) * rows if padding_idx >= 0 else -1
    local = local.masked_fill(elsewhere, 0)
    found = aten.embedding.default(weight, local, padding if 0 <= padding < rows else -1)
    return found.masked_fill(elsewhere.unsqueeze(-1), 0)


def cross_entropy_count(target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """What a mean divides by, on this rank: the number of tokens that count, or their weight. -> float32 [], or float64
    for weights in float64."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum().float()
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    return wide[target.masked_fill(~counted, 0)].masked_fill(~counted, 0).sum()


def cross_entropy(
    comm: Comm,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    *,
    class_axes: tuple[str, ...] = (),
    denominator: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of class indices.

    logits: [tokens, classes, ...] or [classes]; target: int, without the class dim. reduction: 0 none, 1 mean, 2 sum.
    class_axes: the axes that split the classes, outermost first. denominator: [] count over the whole batch; the result
    is then the sum over this rank's tokens divided by it.
    """
    if class_axes:
        losses = _parallel_losses(comm, logits, target, ignore_index, label_smoothing, class_axes)
        if reduction == 0:
            return losses
        total = losses.sum()
        if reduction == 2:
            return total
        count = cross_entropy_count(target, None, ignore_index) if denominator is None else denominator
        return total / count.to(total.dtype)
    if denominator is None:
        return aten.cross_entropy_loss.default(logits, target, weight, reduction, ignore_index, label_smoothing)
    total = aten.cross_entropy_loss.default(logits, target, weight, 2, ignore_index, label_smoothing)
    return total / denominator.to(total.dtype)


def nll_loss(
    logs: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    denominator: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log likelihood of class indices; shapes, reduction and denominator as in `cross_entropy`."""
    if denominator is None:
        return aten.nll_loss_nd.default(logs, target, weight, reduction, ignore_index)
    total = aten.nll_loss_nd.default(logs, target, weight, 2, ignore_index)
    return total / denominator.to(total.dtype)


def _parallel_losses(
    comm: Comm,
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    axes: tuple[str, ...],
) -> torch.Tensor:
    if logits.ndim > 1:
        logits = logits.movedim(1, -1)
    classes = logits.shape[-1]
    part = 0
    for axis in axes:
        part = part * comm.size(axis) + comm.index(axis)
    local = target - part * classes
    ignored = target == ignore_index
    elsewhere = (local < 0) | (local >= classes) | ignored
    local = local.masked_fill(elsewhere, 0)
    losses = _ParallelCrossEntropy.apply(logits, local, elsewhere, comm, axes, smoothing)
    return losses.masked_fill(ignored, 0)  # type: ignore[union-attr]


class _ParallelCrossEntropy(Function):
    """Shoeybi et al. 2019 (Megatron-LM), section 3: three reductions of [tokens] instead of a gather of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        local: torch.Tensor,
        elsewhere: torch.Tensor,
        comm: Comm,
        axes: tuple[str, ...],
        smoothing: float,
    ) -> torch.Tensor:
        work = logits.double() if logits.dtype == torch.float64 else logits.float()
        highest, width = work.amax(-1), work.shape[-1]
        for axis in axes:
            highest = comm.all_reduce(highest, axis, "max")
            width *= comm.size(axis)
        shifted = work - highest.unsqueeze(-1)
        chosen = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0)
        powers = shifted.exp()
        parts = [chosen, powers.sum(-1)]
        if smoothing:
            parts.append(shifted.sum(-1))
        sums = torch.stack(parts)
        for axis in axes:
            sums = comm.all_reduce(sums, axis)
        chosen, total, *rest = sums.unbind()
        log_total = total.log()
        losses = log_total - chosen
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (log_total - rest[0] / width)
        ctx.save_for_backward(powers / total.unsqueeze(-1), local, elsewhere)
        ctx.smoothing, ctx.width = smoothing, width
        return losses.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        share, local, elsewhere = ctx.saved_tensors
        result = share.clone()
        hit = (~elsewhere).to(result.dtype).unsqueeze(-1) * (1 - ctx.smoothing)
        result.scatter_add_(-1, local.unsqueeze(-1), -hit)
        if ctx.smoothing:
            result -= ctx.smoothing / ctx.width
        result *= grad.unsqueeze(-1)
        return result.to(grad.dtype), None, None, None, None, None


def batch_norm(
    comm: Comm,
    axes: tuple[str, ...],
    replicas: tuple[str, ...],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = True,
) -> torch.Tensor:
    """Batch normalisation with the statistics of all ranks on `axes`. x: [n, c, ...] -> same shape.

    Running statistics are updated in place with those of the whole batch, as one device would. replicas: axes on which
    every rank has statistics of its own; the running ones take their mean, so that they stay the same everywhere.
    """
    dims = [0, *range(2, x.ndim)]
    view = [1, -1, *[1] * (x.ndim - 2)]
    ranks = 1
    for axis in axes:
        ranks *= comm.size(axis)
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if axes:
        # Every rank has as many elements: the mean is that of the means, the variance within ranks adds to that
        # between.
        gathered = _GatherRanks.apply(torch.stack(_moments(work, dims, view)), comm, axes)
        means, spreads = gathered.unbind(1)  # type: ignore[union-attr]
        mean = means.mean(0)
        var = (spreads + (means - mean).square()).mean(0)
        result = (work - mean.view(view)) * torch.rsqrt(var + eps).view(view)
        if weight is not None:
            result = result * weight.view(view)
        if bias is not None:
            result = result + bias.view(view)
        result = result.to(x.dtype)
    else:
        result = aten.batch_norm.default(x, weight, bias, None, None, True, momentum, eps, cudnn)
        mean, var = _moments(work.detach(), dims, view)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1] * ranks
        moved = torch.stack([mean.detach(), var.detach() * (count / max(count - 1, 1))])
        for axis in replicas:
            moved = comm.all_reduce(moved, axis) / comm.size(axis)
        # `data`: as in the op itself, backward must not take the statistics it was given for changed.
        for running, new in zip((running_mean, running_var), moved, strict=True):
            running.data.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)
    return result


def _moments(x: torch.Tensor, dims: list[int], view: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance by channel."""
    mean = x.mean(dims)
    return mean, (x - mean.view(view)).square().mean(dims)


class _GatherRanks(Function):
    """[...] -> [ranks, ...]: what every rank of some axes has. The gradients of a rank's part are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, axes: tuple[str, ...]) -> torch.Tensor:
        ctx.comm, ctx.axes = comm, axes
        x = x.unsqueeze(0)
        for axis in axes:
            x = comm.all_gather(x, 0, axis)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        for axis in reversed(ctx.axes):
            grad = ctx.comm.reduce_scatter(grad.contiguous(), 0, axis)
        return grad.squeeze(0), None, None
