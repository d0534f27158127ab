"""Differentiable conversions between placements: what the rewriter inserts on the edges of a stage graph.

One function per entry of `planner.placement`'s conversion table, named ``<forward>_<backward>`` where they differ in
kind. Each takes the communicator first, then the local tensor; `axis` is a mesh axis. ``sections`` are the sizes of
the sections of the *unsplit* dim (see `Placement.sections`); empty for a contiguous split. They are autograd functions
over the communicator's primitives, so they work under any implementation of `rewrite.comm.Comm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from shardplan.rewrite.comm import Comm

Sections = tuple[int, ...]


def take(x: torch.Tensor, dim: int, index: int, size: int, sections: Sections = ()) -> torch.Tensor:
    """Part `index` of `size` even parts of `dim` (of each section). x: the whole dim. A view where contiguous."""
    if not sections:
        part = x.shape[dim] // size
        return x.narrow(dim, index * part, part)
    pieces, offset = [], 0
    scale = sum(sections) // x.shape[dim]
    for section in sections:
        part = section // scale // size
        pieces.append(x.narrow(dim, offset + index * part, part))
        offset += section // scale
    return torch.cat(pieces, dim)


def _put(x: torch.Tensor, dim: int, index: int, size: int, sections: Sections = ()) -> torch.Tensor:
    """A part put back into zeros of the whole dim: the transpose of `take`."""
    shape = list(x.shape)
    shape[dim] *= size
    whole = x.new_zeros(shape)
    if not sections:
        whole.narrow(dim, index * x.shape[dim], x.shape[dim]).copy_(x)
        return whole
    scale = sum(sections) // shape[dim]
    source, offset = 0, 0
    for section in sections:
        part = section // scale // size
        whole.narrow(dim, offset + index * part, part).copy_(x.narrow(dim, source, part))
        source += part
        offset += section // scale
    return whole


def _by_section(x: torch.Tensor, dim: int, size: int, sections: Sections) -> torch.Tensor:
    """From rank-major order (what a gather gives) to section-major order (the original)."""
    scale = sum(sections) // x.shape[dim]
    lengths = [section // scale // size for section in sections]
    parts = [part.split(lengths, dim) for part in x.chunk(size, dim)]
    return torch.cat([parts[rank][k] for k in range(len(lengths)) for rank in range(size)], dim)


def _by_rank(x: torch.Tensor, dim: int, size: int, sections: Sections) -> torch.Tensor:
    """From section-major order to rank-major order (what a scatter wants)."""
    return torch.cat([take(x, dim, rank, size, sections) for rank in range(size)], dim)


def _gather(comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections) -> torch.Tensor:
    whole = comm.all_gather(x, dim, axis)
    return _by_section(whole, dim, comm.size(axis), sections) if sections else whole


def _scatter(comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections) -> torch.Tensor:
    return comm.reduce_scatter(_by_rank(x, dim, comm.size(axis), sections) if sections else x, dim, axis)


class _IdentityAllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, axis: str) -> torch.Tensor:
        ctx.comm, ctx.axis = comm, axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return ctx.comm.all_reduce(grad, ctx.axis), None, None


class _AllReduceIdentity(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, axis: str) -> torch.Tensor:
        return comm.all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


class _AllReduceAllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, axis: str) -> torch.Tensor:
        ctx.comm, ctx.axis = comm, axis
        return comm.all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return ctx.comm.all_reduce(grad, ctx.axis), None, None


class _GatherSlice(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, dim: int, axis: str, sections: Sections) -> torch.Tensor:
        ctx.place = (dim, comm.index(axis), comm.size(axis), sections)
        return _gather(comm, x, dim, axis, sections)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return take(grad, *ctx.place).contiguous(), None, None, None, None


class _GatherScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, dim: int, axis: str, sections: Sections) -> torch.Tensor:
        ctx.place = (dim, axis, sections)
        ctx.comm = comm
        return _gather(comm, x, dim, axis, sections)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _scatter(ctx.comm, grad, *ctx.place), None, None, None, None


class _SliceGather(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, dim: int, axis: str, sections: Sections) -> torch.Tensor:
        ctx.place = (dim, axis, sections)
        ctx.comm = comm
        return take(x, dim, comm.index(axis), comm.size(axis), sections).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _gather(ctx.comm, grad, *ctx.place), None, None, None, None


class _SlicePad(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, dim: int, axis: str, sections: Sections) -> torch.Tensor:
        ctx.place = (dim, comm.index(axis), comm.size(axis), sections)
        return take(x, *ctx.place).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _put(grad, *ctx.place), None, None, None, None


class _PadSlice(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, dim: int, axis: str, sections: Sections) -> torch.Tensor:
        ctx.place = (dim, comm.index(axis), comm.size(axis), sections)
        return _put(x, *ctx.place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return take(grad, *ctx.place).contiguous(), None, None, None, None


class _ScatterGather(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, dim: int, axis: str, sections: Sections) -> torch.Tensor:
        ctx.place = (dim, axis, sections)
        ctx.comm = comm
        return _scatter(comm, x, dim, axis, sections)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _gather(ctx.comm, grad, *ctx.place), None, None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, comm: Comm, split: int, concat: int, axis: str, into: Sections, out_of: Sections
    ) -> torch.Tensor:
        ctx.comm, ctx.place = comm, (concat, split, axis, out_of, into)
        return _reshuffle(comm, x, split, concat, axis, into, out_of)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (_reshuffle(ctx.comm, grad, *ctx.place), None, None, None, None, None, None)


def _reshuffle(
    comm: Comm, x: torch.Tensor, split: int, concat: int, axis: str, into: Sections, out_of: Sections
) -> torch.Tensor:
    size = comm.size(axis)
    if split == concat:
        return take(_gather(comm, x, concat, axis, out_of), split, comm.index(axis), size, into).contiguous()
    if into:
        x = _by_rank(x, split, size, into)
    x = comm.all_to_all(x, split, concat, axis)
    return _by_section(x, concat, size, out_of) if out_of else x


class _MaskIdentity(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: bool) -> torch.Tensor:
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class _IdentityMask(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: bool) -> torch.Tensor:
        ctx.first = first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (grad if ctx.first else torch.zeros_like(grad)), None


class _Mask(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: bool) -> torch.Tensor:
        ctx.first = first
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (grad if ctx.first else torch.zeros_like(grad)), None


def identity_all_reduce(comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """R -> D: the gradient's summands are added up in backward."""
    return _IdentityAllReduce.apply(x, comm, axis)  # type: ignore[return-value]


def all_reduce(comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """P -> R."""
    return _AllReduceIdentity.apply(x, comm, axis)  # type: ignore[return-value]


def all_reduce_all_reduce(comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """P -> D."""
    return _AllReduceAllReduce.apply(x, comm, axis)  # type: ignore[return-value]


def all_gather_slice(comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections = ()) -> torch.Tensor:
    """S -> R."""
    return _GatherSlice.apply(x, comm, dim, axis, sections)  # type: ignore[return-value]


def all_gather_reduce_scatter(
    comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections = ()
) -> torch.Tensor:
    """S -> D."""
    return _GatherScatter.apply(x, comm, dim, axis, sections)  # type: ignore[return-value]


def slice_all_gather(comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections = ()) -> torch.Tensor:
    """R -> S."""
    return _SliceGather.apply(x, comm, dim, axis, sections)  # type: ignore[return-value]


def slice_zero_pad(comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections = ()) -> torch.Tensor:
    """D -> S: no communication, the gradient stays a summand. Also R -> S where no gradient flows."""
    return _SlicePad.apply(x, comm, dim, axis, sections)  # type: ignore[return-value]


def zero_pad_slice(comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections = ()) -> torch.Tensor:
    """S -> P."""
    return _PadSlice.apply(x, comm, dim, axis, sections)  # type: ignore[return-value]


def reduce_scatter_all_gather(
    comm: Comm, x: torch.Tensor, dim: int, axis: str, sections: Sections = ()
) -> torch.Tensor:
    """P -> S."""
    return _ScatterGather.apply(x, comm, dim, axis, sections)  # type: ignore[return-value]


def all_to_all(
    comm: Comm,
    x: torch.Tensor,
    split_dim: int,
    concat_dim: int,
    axis: str,
    split_sections: Sections = (),
    concat_sections: Sections = (),
) -> torch.Tensor:
    """S(concat_dim) -> S(split_dim)."""
    return _AllToAll.apply(x, comm, split_dim, concat_dim, axis, split_sections, concat_sections)  # type: ignore[return-value]


def mask_identity(comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """R -> P: the first rank keeps the value; every rank keeps the whole gradient."""
    return _MaskIdentity.apply(x, comm.index(axis) == 0)  # type: ignore[return-value]


def identity_mask(comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """D -> R: the whole gradient counts once."""
    return _IdentityMask.apply(x, comm.index(axis) == 0)  # type: ignore[return-value]


def mask(comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """D -> P."""
    return _Mask.apply(x, comm.index(axis) == 0)  # type: ignore[return-value]
