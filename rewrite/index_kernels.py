"""Local implementations of ops whose indices are known to count up, or point into what is split.

=====================  =======================================================  ====================================
`Strategy.impl`        when                                                     function
=====================  =======================================================  ====================================
``positions``          a dim is split that an index counts through              `from_start`
``embedding_bag``      bags of one size are split, or the vocabulary is         `embedding_bag`
=====================  =======================================================  ====================================
"""

from __future__ import annotations

import torch

from shardplan.rewrite.comm import Comm

aten = torch.ops.aten
SUM, MEAN = 0, 1


def from_start(index: torch.Tensor) -> torch.Tensor:
    """A part of an index that counts up, counted from the part's own start."""
    return index - index[(0,) * index.dim()] if index.numel() else index


def embedding_bag(
    comm: Comm,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    sample_weights: torch.Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    *,
    vocab_axes: tuple[str, ...],
    step: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bags of rows, added up or averaged: of the rows that this rank has, or of this rank's bags, or both.

    weight: [vocab / n, dim], split over `vocab_axes` (the earlier is the outer one); indices: [entries], global rows;
    offsets: [bags], as on one device; step: entries of a bag, where bags are split. -> what the op returns.
    """
    start = offsets[0] if step is not None else None
    local = offsets - start if start is not None else offsets
    if not vocab_axes:
        given = (scale_grad_by_freq, mode, sparse, sample_weights, include_last_offset, padding_idx)
        found = aten.embedding_bag.padding_idx(weight, indices, local, *given)
        return (found[0], _shifted(found[1], start, step), *found[2:])
    rows, rank = weight.shape[0], 0
    for axis in vocab_axes:
        rank = rank * comm.size(axis) + comm.index(axis)
    mine = indices - rank * rows
    elsewhere = (mine < 0) | (mine >= rows)
    if padding_idx is not None:
        elsewhere = elsewhere | (indices == padding_idx)
    counted = torch.ones_like(indices, dtype=weight.dtype) if sample_weights is None else sample_weights
    found = aten.embedding_bag.padding_idx(
        weight, mine.masked_fill(elsewhere, 0), local, False, SUM, sparse, counted.masked_fill(elsewhere, 0),
        include_last_offset, None,
    )  # fmt: skip
    bags = found[1]
    sizes = torch.zeros_like(found[2])
    if mode == MEAN:
        counts = torch.ones_like(indices) if padding_idx is None else (indices != padding_idx).to(indices.dtype)
        sizes = sizes.index_add(0, bags, counts.to(sizes.dtype))
        return found[0] / sizes.clamp(min=1).unsqueeze(-1), _shifted(bags, start, step), sizes, sizes
    return found[0], _shifted(bags, start, step), found[2], found[3]


def _shifted(bags: torch.Tensor, start: torch.Tensor | None, step: int | None) -> torch.Tensor:
    """Bag of every entry, as on one device."""
    return bags if start is None or step is None else bags + start // step
