"""Statements that write: in place on values and views of them, into buffers."""

from __future__ import annotations

from tests.fuzz.builder import Builder, Skip, Value


def _written(b: Builder) -> Value:
    """A value to write to: a fresh copy, or one that others (views of it, earlier readers) share."""
    x = b.ranked(1)
    return x if b.draws.chance(2) else b.add(f"{x}.clone()")


def _part(b: Builder, x: Value) -> str:
    """A view of a part of the value, as text."""
    dim = b.draws.below(x.rank)
    i = b.draws.below(x.shape[dim])
    word = b.draws.one((f"{i}", f"{i}:", f":{i + 1}", "::2", "-1"))
    return f"{x}[{', '.join([*[':'] * dim, word])}]"


CHANGES = (
    "{x}.add_({y})", "{x}.mul_(0.5)", "{x}.mul_({y})", "{x}.copy_({y})", "{x}.zero_()", "{x}.add_(1.0)", "{x}.relu_()",
    "{x}.tanh_()", "{x}.clamp_(-1, 1)", "{x}.sub_({y}, alpha=0.5)", "{x}.fill_(0.5)", "{x}.div_(2.0)", "{x}.neg_()",
    "{x}.masked_fill_({x} > 0, 0.0)", "{x}.exp_()", "{x}.addcmul_({x}, {x}, value=0.1)", "{x}.sigmoid_()",
)  # fmt: skip


def in_place(b: Builder) -> None:
    x = _written(b)
    y = b.pick(lambda v: v.rank <= x.rank)
    b.run(b.draws.one(CHANGES).format(x=x, y=y))


def into_part(b: Builder) -> None:
    x = _written(b)
    part = _part(b, x)
    y = b.pick(lambda v: v.rank <= x.rank)
    form = b.draws.below(3)
    if form == 0:
        b.run(f"{part} = {b.draws.one((f'{y}', '0.5', f'{part} * 2', f'{part} + 1'))}")
    elif form == 1:
        b.run(b.draws.one(CHANGES).format(x=part, y=y))
    else:
        b.run(f"{part} += {b.draws.one(('1.0', f'{y}'))}")


def through_view(b: Builder) -> None:
    """A view kept under a name, written to, and both read afterwards."""
    x = _written(b)
    view = b.add(
        b.draws.one((f"{x}.transpose(0, -1)", f"{x}.view(-1)", f"{x}.unsqueeze(0)", f"{x}.detach()", _part(b, x)))
    )
    y = b.pick(lambda v: v.rank <= view.rank)
    b.run(b.draws.one(CHANGES).format(x=view, y=y))
    b.add(f"{x}.sum() + {view}")


def by_index(b: Builder) -> None:
    x = _written(b)
    extent = x.shape[0]
    rows = [b.draws.below(extent) for _ in range(2)]
    i = f"torch.tensor({rows})"
    form = b.draws.below(6)
    if form == 0:
        b.run(f"{x}[{i}] = 0.25")
    elif form == 1:
        b.run(f"{x}.index_put_(({i},), {b.param((2, *x.shape[1:]))}, accumulate=True)")
    elif form == 2:
        b.run(f"{x}[{x} > 0] = 0.5")
    elif form == 3:
        b.run(f"{x}.scatter_(-1, {x}.argmax(-1, keepdim=True), 1.0)")
    elif form == 4:
        b.run(f"{x}.index_add_(0, {i}, {b.param((2, *x.shape[1:]))})")
    else:
        ids = b.pick(lambda v: v.rank == 1, "int")
        b.run(f"{x}.index_put_(({ids} % {extent},), torch.ones((), dtype={x}.dtype), accumulate=True)")


def statistics(b: Builder) -> None:
    """A buffer that the forward writes, read before or after."""
    x = b.ranked(1)
    last = x.shape[-1]
    form = b.draws.below(6)
    whole = list(range(x.rank - 1))
    if form == 5:
        count = b.buffer("torch.zeros((), dtype=torch.long)")
        b.run(f"{count}.add_(1)")
        b.add(f"{x} * {count}")
        return
    mean = b.buffer(f"torch.zeros({last}, dtype=D)")
    new = f"{x}.detach().to(D).mean({whole})" if whole else f"{x}.detach().to(D)"
    if form == 0:
        b.run(f"{mean}.mul_(0.9).add_({new}, alpha=0.1)")
        b.add(f"{x} - {mean}.clone()")
    elif form == 1:
        b.add(f"{x} - {mean}.clone()")
        b.run(f"{mean}.copy_({new})")
    elif form == 2:
        b.run(f"with torch.no_grad(): {mean} += {new}")
    elif form == 3:
        b.run(f"{mean}[0] = {new}.sum()")
    else:
        b.run(f"{mean}.lerp_({new}, 0.2)")
        b.add(f"{x} * {mean}.clone()")


def constant_buffer(b: Builder) -> None:
    x = b.ranked(1)
    table = b.buffer(f"torch.linspace(0, 1, {x.shape[-1]}, dtype=D)")
    b.add(f"{x} * {table}")


def plain_state(b: Builder) -> None:
    """Values cut from the graph and joined to it again."""
    x = b.ranked(1)
    y = b.add(b.draws.one((f"{x}.detach() * 2", f"({x} > 0).to(D)", f"{x} + ({x}.round() - {x}).detach()")))
    if y.kind != "float":
        raise Skip
    b.add(f"{x} * {y}")
