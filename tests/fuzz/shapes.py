"""Statements: views, joins, slices, lookups by index."""

from __future__ import annotations

import math

from tests.fuzz.builder import EXTENTS, Builder, Value


def merge(b: Builder) -> None:
    x = b.ranked(2)
    first = b.draws.below(x.rank - 1)
    last = first + 1 + b.draws.below(x.rank - first - 1)
    if b.draws.chance(2):
        shape = [
            *x.shape[:first],
            -1 if b.draws.chance(2) else math.prod(x.shape[first : last + 1]),
            *x.shape[last + 1 :],
        ]
        b.add(f"{x}.reshape({shape})")
    else:
        b.add(f"{x}.flatten({first}, {last})")


def _factors(b: Builder, extent: int) -> tuple[int, int]:
    return b.draws.one([(f, extent // f) for f in (2, 3, 4, 1) if extent % f == 0])


def divide(b: Builder) -> None:
    x = b.ranked(1)
    dim = b.dim(x, signed=False)
    a, c = _factors(b, x.shape[dim])
    if b.draws.chance(2):
        b.add(f"{x}.unflatten({dim}, ({a}, {c}))")
    else:
        b.add(f"{x}.view({[*x.shape[:dim], a, c, *x.shape[dim + 1 :]]})")


def regroup(b: Builder) -> None:
    """Reshape to any factorisation of the number of entries."""
    x = b.ranked(1)
    left, shape = math.prod(x.shape), []
    while left > 1 and len(shape) < 4:
        found = [f for f in EXTENTS if f > 1 and left % f == 0] or [left]
        shape.append(b.draws.one(found))
        left //= shape[-1]
    if left > 1:
        shape.append(left)
    if b.draws.chance(2):
        shape.insert(b.draws.below(len(shape) + 1), 1)
    b.add(f"{x}.reshape({shape})")


def permute(b: Builder) -> None:
    x = b.ranked(2)
    form = b.draws.below(4)
    if form == 0:
        b.add(f"{x}.transpose({b.dim(x)}, {b.dim(x)})")
    elif form == 1:
        order = list(range(x.rank))
        for i in range(x.rank):
            j = i + b.draws.below(x.rank - i)
            order[i], order[j] = order[j], order[i]
        b.add(f"{x}.permute({order})")
    elif form == 2:
        b.add(f"{x}.movedim({b.dim(x)}, {b.dim(x)})")
    else:
        b.add(f"{x}.mT")


def ones(b: Builder) -> None:
    """Dims of size 1: put in, taken out, repeated."""
    x = b.ranked(0, 4)
    form = b.draws.below(6)
    if form == 0:
        b.add(f"{x}.unsqueeze({b.draws.below(x.rank + 1)})")
    elif form == 1:
        b.add(f"{x}.squeeze()")
    elif form == 2:
        b.add(f"{x}.squeeze({b.dim(x)})")
    elif form == 3:
        y = b.add(f"{x}.unsqueeze({b.draws.below(x.rank + 1)})")
        shape = [b.draws.one((2, 3, 4)) if extent == 1 else b.draws.one((-1, extent)) for extent in y.shape]
        b.add(f"{y}.expand({shape})")
    elif form == 4:
        front = [b.draws.one((2, 4))] if b.draws.chance(2) else []
        b.add(f"{x}.repeat({[*front, *(b.draws.one((1, 2)) for _ in x.shape)] or [2]})")
    else:
        b.add(f"{x}.repeat_interleave(2, dim={b.dim(x)})")


def join(b: Builder) -> None:
    x = b.ranked(1)
    if b.draws.chance(2):
        y = b.pick(lambda v: v.shape == x.shape)
        dim = b.draws.below(x.rank + 1)
        b.add(f"torch.stack([{x}, {y}], dim={dim - x.rank - 1 if b.draws.chance(2) else dim})")
        return
    dim = b.dim(x)
    d = dim % x.rank

    def joins(v: Value) -> bool:
        return v.rank == x.rank and all(p == q for i, (p, q) in enumerate(zip(v.shape, x.shape, strict=True)) if i != d)

    parts = [x, *(b.pick(joins) for _ in range(1 + b.draws.below(2)))]
    if b.draws.chance(3):
        parts[0], parts[-1] = parts[-1], parts[0]
    extra = [b.param([*x.shape[:d], 1, *x.shape[d + 1 :]])] if b.draws.chance(4) else []
    b.add(f"torch.cat([{', '.join([*extra, *map(str, parts)])}], dim={dim})")


def take_apart(b: Builder) -> None:
    """chunk, split, unbind; the parts are often used differently."""
    x = b.ranked(1)
    dim = b.dim(x)
    extent = x.shape[dim]
    form = b.draws.below(4)
    if form == 0:
        parts = b.add_several(f"{x}.chunk(2, dim={dim})", 2)
    elif form == 1:
        cut = 1 + b.draws.below(extent - 1)
        parts = b.add_several(f"{x}.split([{cut}, {extent - cut}], dim={dim})", 2)
    elif form == 2:
        size = b.draws.one((1, 2, 3))
        parts = b.add_several(f"{x}.split({size}, dim={dim})", -(-extent // size))
    else:
        parts = b.add_several(f"{x}.unbind({dim})", extent)
    if b.draws.chance(2) and len(parts) > 1:
        if parts[0].shape == parts[1].shape:
            b.add(b.draws.one((f"{parts[0]} * {parts[1]}", f"F.silu({parts[0]}) * {parts[1]}")))
        else:
            b.add(f"torch.cat([{parts[1]}, {parts[0]}], dim={dim})")


def cut(b: Builder) -> None:
    x = b.ranked(1)
    dim = b.draws.below(x.rank)
    extent = x.shape[dim]
    i = b.draws.below(extent)
    words = (
        f"{i}", f"{i}:", f":{i + 1}", f"{i - extent}", "::2", f"{-1 - i}:", "1::2", ":-1", "None",
        f"{i}:{i + 1}", "1:-1",
    )  # fmt: skip
    word = b.draws.one(words)
    text = ", ".join([*[":"] * dim, word])
    if b.draws.chance(3):
        text = ", ".join(["...", word, *[":"] * (x.rank - dim - 1)])
    y = b.add(f"{x}[{text}]")
    if word == f":{i + 1}" and i + 1 < extent and b.draws.chance(2):
        z = b.add(f"{x}[{', '.join([*[':'] * dim, f'{i + 1}:'])}]")
        b.add(f"torch.cat([-{z}, {y}], dim={dim})")


def move(b: Builder) -> None:
    """pad, roll, flip, diagonal, windows."""
    x = b.ranked(1)
    dim = b.dim(x)
    form = b.draws.below(8)
    if form == 0:
        b.add(f"F.pad({x}, (1, 2))")
    elif form == 1:
        b.add(f"F.pad({x}, (0, 0, 1, 0), value={b.draws.one((0.0, 1.5))})")
    elif form == 2:
        b.add(f"{x}.roll({b.draws.one((1, -1, 2))}, {dim})")
    elif form == 3:
        b.add(f"{x}.flip({dim})")
    elif form == 4:
        b.add(f"{x}.diagonal(dim1={b.dim(x)}, dim2={b.dim(x)})")
    elif form == 5:
        b.add(f"{x}.unfold({dim}, 2, {b.draws.one((1, 2))})")
    elif form == 6:
        b.add(f"{x}.narrow({dim}, {b.draws.below(x.shape[dim])}, 1)")
    else:
        b.add(f"F.pad({x}, (1, -1))")


def lookup(b: Builder) -> None:
    """gather, index_select, x[i], take_along_dim: by an integer input, by positions, by an argsort."""
    x = b.ranked(1)
    dim = b.dim(x, signed=False)
    extent = x.shape[dim]
    form = b.draws.below(7)
    positions = f"torch.tensor({[b.draws.below(extent) for _ in range(b.draws.one((2, 4, 3)))]})"
    front = ", ".join([":"] * dim + [""])
    if form == 0:
        b.add(f"{x}.index_select({dim}, {positions})")
    elif form == 1:
        b.add(f"{x}[{front}{positions}]")
    elif form == 2:
        i = b.pick(lambda v: v.rank in (1, 2), "int")
        b.add(f"{x}[{front}{i} % {extent}]")
    elif form == 3:
        b.add(f"torch.gather({x}, {dim}, {x}.argsort({dim}))")
    elif form == 4:
        i = b.pick(lambda v: v.rank == x.rank, "int")
        b.add(f"torch.gather({x}, {dim}, {i} % {extent})")
    elif form == 5 and x.rank > 1:
        i = b.pick(lambda v: v.shape == x.shape[:1], "int")
        b.add(f"{x}[torch.arange({x.shape[0]}), {i} % {x.shape[1]}]")
    else:
        b.add(f"torch.take_along_dim({x}, {x}.argmax({dim}, keepdim=True), {dim})")


def scatter(b: Builder) -> None:
    x = b.ranked(1)
    dim = b.dim(x, signed=False)
    extent = x.shape[dim]
    form = b.draws.below(5)
    if form == 0:
        i = b.pick(lambda v: v.rank == 1, "int")
        size = [*x.shape[:dim], i.shape[0], *x.shape[dim + 1 :]]
        b.add(f"{x}.index_add({dim}, {i} % {extent}, {b.param(size)})")
    elif form == 1:
        b.add(f"{x}.new_zeros({list(x.shape)}).scatter_add({dim}, {x}.argsort({dim}) // 2, {x})")
    elif form == 2:
        i = b.pick(lambda v: v.shape == x.shape, "int")
        b.add(f"{x}.scatter_add({dim}, {i} % {extent}, {x})")
    elif form == 3:
        b.add(f"{x}.scatter({dim}, {x}.argmax({dim}, keepdim=True), 0.5)")
    else:
        i = b.pick(lambda v: v.rank == 1 and v.shape[0] == x.shape[0], "int")
        b.add(f"torch.zeros(4, {', '.join(map(str, x.shape[1:]))}, dtype={x}.dtype).index_add(0, {i} % 4, {x})")
