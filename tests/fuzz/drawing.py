"""Bytes -> a program."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from tests.fuzz import elementwise, products, shapes, whole, writes
from tests.fuzz.builder import Builder, Draws, Skip, Value
from tests.fuzz.program import Program

STATEMENTS: tuple[Callable[[Builder], None], ...] = (
    products.linear, products.linear, products.linear, elementwise.unary, elementwise.unary, elementwise.binary,
    elementwise.binary_parameter, elementwise.binary_parameter, products.matmul_parameter, products.matmul_values,
    products.added_product, products.einsum, products.einsum, products.convolution, products.convolution,
    products.pool, products.embedding, products.embedding, products.tied_head, products.attention,
    products.fused_attention, products.module, products.module, products.module, products.recurrent,
    products.normalise, products.normalise, products.normalise, elementwise.skip_branch, elementwise.skip_branch,
    elementwise.compare, elementwise.masked, elementwise.masked, elementwise.reduce, elementwise.reduce,
    elementwise.reduce, elementwise.along, elementwise.along, elementwise.integers, shapes.merge, shapes.merge,
    shapes.divide, shapes.divide, shapes.regroup, shapes.permute, shapes.permute, shapes.ones, shapes.ones,
    shapes.join, shapes.join, shapes.take_apart, shapes.take_apart, shapes.cut, shapes.cut, shapes.move,
    shapes.lookup, shapes.lookup, shapes.scatter, writes.in_place, writes.into_part, writes.through_view,
    writes.by_index, writes.statistics, writes.constant_buffer, writes.plain_state, whole.inner_loss, whole.inner_loss,
    whole.rotary, whole.experts, whole.scan, whole.complex_numbers, whole.autocast, whole.relative_positions,
    whole.windows, whole.pooled, whole.graph,
)  # fmt: skip


def draw_program(header: bytes, statements: Sequence[bytes]) -> Program:
    """A program of at most as many statements (some bytes mean nothing where they stand and are passed over)."""
    b = Builder(Draws(header))
    _inputs(b)
    for data in statements:
        b.draws = Draws(data)
        _statement(b)
    b.draws = Draws(header[8:])
    _finish(b)
    return b.program


def _inputs(b: Builder) -> None:
    size = b.batch_size
    makers = [
        ("x", f"torch.randn({[size, *(b.extent() for _ in range(b.draws.one((1, 2, 3, 0))))]}, dtype=D)"),
        ("ids", f"torch.randint(0, 6, {[size, b.extent()] if b.draws.chance(2) else [size]})"),
        ("y", f"torch.randn({[size, b.extent(), b.extent()]}, dtype=D)"),
        ("mask", f"torch.rand({[size, b.extent()]}) > 0.3"),
        ("table", f"torch.randn({[size + 1, b.extent()]}, dtype=D)"),
    ]
    used = [makers[0], *(maker for maker in makers[1:] if b.draws.chance(3))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, expression in used:
            b.program.inputs[name] = expression
            tensor = b.namespace[name] = eval(expression, b.namespace)
            kind = {"ids": "int", "mask": "bool"}.get(name, "float")
            b.values.append(Value(name, tuple(tensor.shape), kind))
    b.program.evaluating = b.draws.chance(10)
    b.module.train(not b.program.evaluating)


def _statement(b: Builder) -> None:
    """One statement, or nothing: what it had prepared goes with it."""
    attributes, params, tables = len(b.program.attributes), len(b.params), len(b.tables)
    body = len(b.program.body)
    try:
        b.draws.one(STATEMENTS)(b)
    except Skip:
        if len(b.program.body) == body:
            del b.program.attributes[attributes:], b.params[params:], b.tables[tables:]


def _finish(b: Builder) -> None:
    """The loss, of one to three values; its form; what else is returned."""
    floats = [v for v in reversed(b.values) if v.kind == "float"]
    x = floats[0]
    form = b.draws.below(7)
    if form >= 5:
        _classify(b, x)
        return
    # Mostly of everything that nobody reads, so that little of the program is dead.
    text = "\n".join(b.program.body)
    unread = [v for v in floats if len(re.findall(rf"\b{v}\b", text)) < 2 and v != x]
    terms = [_term(b, x), *(f"0.1 * {_term(b, v)}" for v in unread[: b.draws.one((2, 8, 8, 0))])]
    if b.draws.chance(3):
        terms.append(f"0.1 * {_term(b, b.draws.one(floats))}")
    # A trainable parameter for sure, and one that no op reads.
    b.attribute("last", "nn.Parameter(torch.ones(2, dtype=D))")
    b.attribute("unused", "nn.Parameter(torch.ones(3, dtype=D))")
    terms.append(f"{terms.pop()} * self.last.sum()")
    loss = " + ".join(terms)
    others = [v.name for v in reversed(b.values[-6:]) if b.draws.chance(3)]
    if form < 2 or not others:
        b.program.returned = loss
    elif form < 4:
        b.program.returned = f'{{"loss": {loss}, "others": [{", ".join(others)}]}}'
    else:
        b.program.returned = f"({loss}, {', '.join(others)})"
        b.program.loss = "output[0] + target.mean()"
        b.program.target = f"torch.randn({b.batch_size}, dtype=D)"


def _term(b: Builder, x: Value) -> str:
    forms = ("{x}.mean()", "{x}.sum()", "({x} ** 2).mean()", "F.mse_loss({x}, torch.ones_like({x}))",
             "{x}.sum(-1).mean()", "F.smooth_l1_loss({x}, {x} * 0.5)", "({x} * {x}).sum() / {n}",
             "F.l1_loss({x}, {x}.detach() + 1)", "{x}.logsumexp(0).sum()")  # fmt: skip
    return b.draws.one(forms if x.rank else forms[:2]).format(x=x, n=max(1, x.rank * 3))


def _classify(b: Builder, x: Value) -> None:
    """A cross entropy or mean squared error as loss function of the output."""
    b.attribute("last", "nn.Parameter(torch.ones(2, dtype=D))")
    if x.rank < 1 or b.draws.chance(3):
        b.program.returned = f"{x} * self.last.sum()"
        reduction = b.draws.one(("mean", "sum"))
        b.program.loss = f"F.mse_loss(output, target, reduction={reduction!r})"
        b.program.target = f"torch.randn({list(x.shape)}, dtype=torch.{str(b.tensor(x).dtype).removeprefix('torch.')})"
        return
    classes = x.shape[-1]
    b.program.returned = f"{x} * self.last.sum()"
    weights = b.draws.one(
        ("", "", ", label_smoothing=0.1", f", weight=torch.linspace(1, 2, {classes}, dtype=output.dtype)")
    )
    reduction = b.draws.one(("mean", "mean", "mean", "sum"))
    rows = f"output.reshape(-1, {classes}), target.reshape(-1)"
    b.program.loss = f"F.cross_entropy({rows}, ignore_index=0, reduction={reduction!r}{weights})"
    b.program.target = f"torch.randint(0, {classes}, {list(x.shape[:-1])})"
