"""Statements: elementwise ops, comparisons, reductions, sorting."""

from __future__ import annotations

from tests.fuzz.builder import Builder, Skip

UNARY = (
    "F.relu({x})", "F.gelu({x})", "torch.tanh({x})", "F.silu({x})", "{x} * 0.5", "{x} + 1", "1 - {x}", "-{x}",
    "{x} / 3", "torch.sigmoid({x})", "{x}.abs()", "{x} ** 2", "torch.exp(-{x}.abs())", "torch.log1p({x}.abs())",
    "({x}.abs() + 1).sqrt()", "({x}.abs() + 1).reciprocal()", "({x}.abs() + 1).rsqrt()", "torch.sin({x})",
    "{x}.clamp(-0.5, 0.5)", "{x}.clamp(min=0.1)", "F.leaky_relu({x}, 0.1)", "F.elu({x})", "F.softplus({x})",
    "{x}.clone()", "{x}.contiguous()", "{x}.detach()", "{x}.sign()", "torch.erf({x})", "{x} - 0.0", "{x} * 0",
    "F.dropout({x}, 0.0)", "F.dropout({x}, 0.5, training=False)", "{x}.to(torch.float32)", "{x}.double()",
    "{x}.float().to(D)", "torch.zeros_like({x}) + {x}", "torch.rsub({x}, 2.0)", "{x}.square()", "F.hardtanh({x})",
    "torch.ones_like({x}) * {x}", "{x}.floor() + {x}", "F.logsigmoid({x})", "F.relu6({x})", "F.hardswish({x})",
    "{x}.type_as({x})", "{x} % 0.7", "torch.nan_to_num({x})", "{x}.new_full({x}.shape, 0.5) * {x}",
)  # fmt: skip
BINARY = (
    "{x} + {y}", "{x} * {y}", "{x} - {y}", "{x} / ({y}.abs() + 1)", "torch.maximum({x}, {y})",
    "torch.where({x} > {y}, {x}, {y})", "torch.where({x} > 0, {y}, 0.0)", "torch.add({x}, {y}, alpha=0.5)",
    "torch.lerp({x}, {y}, 0.3)", "torch.addcmul({x}, {y}, {x}, value=0.5)", "{x}.masked_fill({y} > 0, 0.0)",
    "{x}.masked_fill({y} > 0, -1.5)", "torch.where({y} > 0, 0.0, {x})", "torch.minimum({x}, {y})",
    "torch.sub({x}, {y}, alpha=2)", "torch.atan2({x}, {y}.abs() + 1)", "torch.hypot({x}, {y}.abs() + 1)",
    "({x} > {y}).to(D) * {x}", "torch.rsub({x}, {y})", "{x}.sigmoid() * {y}.tanh()", "torch.logaddexp({x}, {y})",
    "torch.where({x} > 0, 1.0, {y})", "torch.broadcast_tensors({x}, {y})[0] + {y}",
    "torch.addcdiv({x}, {y}, {x}.abs() + 1)", "{x} * ({y} > 0)", "torch.pow({x}.abs() + 0.5, {y}.sigmoid())",
)  # fmt: skip


def unary(b: Builder) -> None:
    template = b.draws.one(UNARY)
    b.add(template.format(x=b.ranked(0)), b.draws.one(("",) * 15 + ("with torch.no_grad(): ",)))


def binary(b: Builder) -> None:
    template = b.draws.one(BINARY)
    x = b.ranked(0)
    y = b.ranked(0)
    b.add(template.format(x=x, y=y))


def binary_parameter(b: Builder) -> None:
    """With a parameter that broadcasts: some dims 1, leading ones left out, or dims of its own in front."""
    template = b.draws.one(BINARY)
    x = b.ranked(0)
    keep = b.draws.below(x.rank + 1)
    shape = [1 if b.draws.chance(3) else extent for extent in x.shape[keep:]]
    if b.draws.chance(6):
        shape = [b.draws.one((2, 4)), *[1] * (x.rank - len(shape)), *shape]
    y = b.param(shape)
    b.add(template.format(x=y, y=x) if b.draws.chance(2) else template.format(x=x, y=y))


def skip_branch(b: Builder) -> None:
    """A sum with an early value of the same shape."""
    x = b.ranked(1)
    same = [v for v in b.values if v.shape == x.shape and v.kind == "float" and v != x]
    b.add(f"{x} + {b.draws.one(same)}")


def compare(b: Builder) -> None:
    x, y = b.ranked(1), b.ranked(1)
    b.add(b.draws.one((f"{x} > 0", f"{x} > {y}", f"{x} == {x}.amax(-1, keepdim=True)", f"({x} > 0) & ({y} < 1)")))


def masked(b: Builder) -> None:
    """Elementwise with a mask that is a value, and masks made of positions."""
    form = b.draws.below(5)
    if form < 2:
        m = b.pick(lambda v: v.rank > 0, "bool")
        x = b.ranked(1)
        templates = ("{x}.masked_fill({m}, 0.0)", "torch.where({m}, {x}, 0.5)", "{x} * {m}", "{x} * ~{m}",
                     "{x}.masked_fill({m}.unsqueeze(-1), 0.0)", "{m}.to(D).mean()", "{m}.sum() * {x}",
                     "{m}.any(-1)", "{m}.cumsum(-1)")  # fmt: skip
        b.add(b.draws.one(templates).format(x=x, m=m))
        return
    x = b.ranked(2)
    n, k = x.shape[-2:]
    b.add(
        b.draws.one(
            (
                f"{x}.tril()",
                f"{x}.triu(1)",
                f"{x}.masked_fill(torch.ones({n}, {k}, dtype=torch.bool).triu(1), -2.0)",
                f"{x} + torch.arange({k}).to(D)",
                f"{x} * torch.arange({n}, dtype=D)[:, None] / {n}",
                f"{x} * torch.linspace(0, 1, {k}, dtype=D)",
                f"{x} + torch.eye({n}, {k}, dtype=D)",
            )
        )
    )


def reduce(b: Builder) -> None:
    x = b.ranked(1)
    count = b.draws.one((1, 1, 1, 2, 0))
    dims = sorted({b.draws.below(x.rank) for _ in range(count)})
    keep = b.draws.one((False, True))
    along = f"dim={dims}, keepdim={keep}" if dims else ""
    single = f"dim={dims[0]}, keepdim={keep}" if len(dims) == 1 else None
    names = ["sum", "mean", "amax", "var", "logsumexp", "std", "norm", "amin"]
    form = b.draws.below(len(names) + 5)
    if form < len(names):
        name = names[form]
        if name == "logsumexp":
            along = along or f"dim={list(range(x.rank))}"
        b.add(f"({x}.{name}({along}) + 1e-3)" if name != "std" else f"({x} + 0.01).{name}({along})")
    elif single is None:
        b.add(b.draws.one((f"{x}.max()", f"{x}.prod() * 0.1", f"{x}.min()", f"{x}.var(correction=0)")))
    elif form == len(names):
        b.add(f"{x}.max({single})[0]")
    elif form == len(names) + 1:
        b.add(f"{x}.argmax({single})")
    elif form == len(names) + 2:
        b.add(f"{x}.var({single}, correction=0)")
    elif form == len(names) + 3:
        b.add(f"{x}.prod({single})")
    else:
        b.add(f"torch.var_mean({x}, {single})[{b.draws.below(2)}]")


def along(b: Builder) -> None:
    """Ops along one dim that keep it."""
    x = b.ranked(1)
    dim = b.dim(x)
    extent = x.shape[dim]
    form = b.draws.below(9)
    if form < 4:
        b.add(b.draws.one((f"{x}.cumsum({dim})", f"{x}.logcumsumexp({dim})", f"{x}.tanh().cumprod({dim})")))
    elif form == 4:
        values, indices = b.add_several(f"{x}.topk({1 + b.draws.below(extent)}, dim={dim})", 2)
        if b.draws.chance(2):
            b.add(f"torch.gather({x}, {dim}, {indices}) * {values}")
    elif form == 5:
        b.add_several(f"{x}.sort(dim={dim}, descending={b.draws.chance(2)}, stable=True)", 2)
    elif form == 6:
        b.add(f"{x}.argsort({dim})")
    elif form == 7:
        b.add(f"{x}.diff(dim={dim})")
    elif extent % 2 == 0:
        b.add(f"F.glu({x}, {dim})")
    else:
        raise Skip


def integers(b: Builder) -> None:
    """Integer arithmetic and integers turned into numbers."""
    i = b.pick(lambda v: v.rank < 4, "int")
    templates = ("{i} + 1", "{i} % 3", "{i}.clamp(max=3)", "{i}.to(D)", "F.one_hot({i} % 4, 4)", "{i}.flip(0)",
                 "F.one_hot({i} % 3, 3).to(D)", "{i}.cumsum(-1)", "{i} // 2", "{i}.unsqueeze(-1)", "({i} > 1)",
                 "({i} != 2).to(D)", "{i}.sum(-1)", "{i}[..., 1:]", "torch.arange({n})")  # fmt: skip
    b.add(b.draws.one(templates).format(i=i, n=i.shape[-1] if i.rank else 3))
