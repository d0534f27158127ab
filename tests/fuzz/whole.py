"""Statements that are idioms of models: losses inside, rotary positions, experts, scans, complex numbers, autocast."""

from __future__ import annotations

from tests.fuzz.builder import Builder, Skip


def inner_loss(b: Builder) -> None:
    """A loss term that the model computes on the way."""
    x = b.ranked(2)
    classes = x.shape[1]
    form = b.draws.below(6)
    y = b.pick(lambda v: v.shape == x.shape)
    if form < 2:
        ids = b.pick(lambda v: v.shape == (x.shape[0], *x.shape[2:]), "int")
        reduction = b.draws.one(("mean", "none", "sum"))
        ignored = b.draws.one(("", ", ignore_index=1"))
        if form == 0:
            b.add(f"F.cross_entropy({x}, {ids} % {classes}, reduction='{reduction}'{ignored})")
        else:
            b.add(f"F.nll_loss(F.log_softmax({x}, 1), {ids} % {classes}, reduction='{reduction}'{ignored})")
    elif form == 2:
        b.add(f"F.binary_cross_entropy_with_logits({x}, ({y} > 0).to({x}.dtype))")
    elif form == 3:
        reduction = b.draws.one(("batchmean", "sum", "mean", "none"))
        b.add(f"F.kl_div(F.log_softmax({x}, -1), F.softmax({y}, -1), reduction='{reduction}')")
    elif form == 4:
        b.add(f"F.cross_entropy({x}, F.softmax({y}, 1))")
    else:
        b.add(f"F.huber_loss({x}, {y}, reduction='{b.draws.one(('mean', 'sum', 'none'))}')")


def rotary(b: Builder) -> None:
    x = b.pick(lambda v: v.rank >= 2 and v.shape[-1] % 2 == 0)
    length, half = x.shape[-2], x.shape[-1] // 2
    angle = b.add(f"torch.arange({length}, dtype=D)[:, None] * torch.linspace(0.1, 1, {half}, dtype=D)")
    turned = f"torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], dim=-1)"
    both = f"torch.cat([{angle}, {angle}], dim=-1)"
    b.add(f"{x} * {both}.cos() + {turned} * {both}.sin()")


def experts(b: Builder) -> None:
    """Every token to its best experts, computed densely or by gathered weights."""
    x = b.ranked(2, 3)
    width, count, k = x.shape[-1], b.draws.one((2, 4, 3)), 1 + b.draws.below(2)
    flat = b.add(f"{x}.reshape(-1, {width})")
    gates = b.add(f"F.softmax({flat} @ {b.param((width, count))}, dim=-1)")
    weights, chosen = b.add_several(f"{gates}.topk({k}, dim=-1)", 2)
    kernel = b.param((count, width, width))
    if b.draws.chance(2):
        mask = b.add(f"F.one_hot({chosen}, {count}).to({weights}.dtype)")
        spread = b.add(f"torch.einsum('nke,nk->ne', {mask}, {weights})")
        y = b.add(f"torch.einsum('nd,edf,ne->nf', {flat}, {kernel}, {spread})")
        if b.draws.chance(2):
            b.add(f"({mask}.sum(1).mean(0) * {gates}.mean(0)).sum() * {count}")
    else:
        y = b.add(f"(torch.einsum('nd,nkdf->nkf', {flat}, {kernel}[{chosen}]) * {weights}[..., None]).sum(1)")
    b.add(f"{y}.view({list(x.shape)})")


def scan(b: Builder) -> None:
    """A recurrence over one dim, unrolled."""
    x = b.pick(lambda v: v.rank == 3)
    decay = b.param((x.shape[-1],))
    h = b.add(f"torch.zeros_like({x}[:, 0])")
    states = []
    for t in range(x.shape[1]):
        h = b.add(f"torch.tanh({h} * {decay} + {x}[:, {t}])")
        states.append(str(h))
    b.add(f"torch.stack([{', '.join(states)}], dim=1)")


def complex_numbers(b: Builder) -> None:
    x = b.pick(lambda v: v.rank >= 1 and v.shape[-1] % 2 == 0)
    form = b.draws.below(4)
    if form == 0:
        b.add(f"torch.fft.rfft({x}, dim=-1).abs()")
    elif form == 1:
        b.add(f"torch.fft.irfft(torch.fft.rfft({x}, dim=-1) * {b.param(())}, n={x.shape[-1]}, dim=-1)")
    else:
        z = f"torch.view_as_complex({x}.unflatten(-1, (-1, 2)).contiguous())"
        angle = b.param((x.shape[-1] // 2,))
        turned = f"{z} * torch.polar(torch.ones_like({angle}), {angle})"
        b.add(f"torch.view_as_real({turned}).flatten(-2)" if form == 2 else f"({turned}).real * ({z}).imag")


def autocast(b: Builder) -> None:
    if b.program.dtype != "float32":
        raise Skip
    x = b.ranked(1)
    weight = b.param((b.extent(), x.shape[-1]))
    y = b.add(f"F.linear({x}, {weight})", 'with torch.autocast("cpu", dtype=torch.bfloat16): ')
    b.add(f"{y}.float()")


def relative_positions(b: Builder) -> None:
    """A table of biases looked up by the distance of two positions."""
    x = b.ranked(2)
    q, k = x.shape[-2:]
    heads = b.draws.one((1, 2))
    table = b.param((q + k, heads))
    distance = b.add(f"torch.arange({q})[:, None] - torch.arange({k})[None, :] + {k}")
    bias = b.add(f"F.embedding({distance}, {table})")
    b.add(f"{x} + {bias}[..., 0]" if b.draws.chance(2) else f"{x} + {bias}.permute(2, 0, 1).sum(0)")


def windows(b: Builder) -> None:
    """Attention windows: a dim in two, blocks moved to the front, and back."""
    x = b.pick(lambda v: v.rank == 3 and v.shape[1] % 2 == 0)
    n, length, width = x.shape
    y = b.add(f"{x}.view({n}, 2, {length // 2}, {width}).reshape({2 * n}, {length // 2}, {width})")
    z = b.add(f"F.softmax({y} @ {y}.mT, dim=-1) @ {y}")
    w = b.add(f"{z}.view({n}, 2, {length // 2}, {width}).reshape({n}, {length}, {width})")
    b.add(f"{w}.roll(1, 1) + {x}")


def pooled(b: Builder) -> None:
    """A mean over the positions that count."""
    x = b.pick(lambda v: v.rank == 3)
    m = b.pick(lambda v: v.shape == x.shape[:2], "bool")
    w = b.add(f"{m}.to({x}.dtype).unsqueeze(-1)")
    b.add(f"({x} * {w}).sum(1) / {w}.sum(1).clamp(min=1)")


def graph(b: Builder) -> None:
    """Messages along edges between rows."""
    x = b.pick(lambda v: v.rank == 2)
    n = x.shape[0]
    ends = [[b.draws.below(n) for _ in range(6)] for _ in range(2)]
    source, target = (f"torch.tensor({e})" for e in ends)
    message = b.add(f"F.linear({x}[{source}], {b.param((x.shape[1], x.shape[1]))})")
    if b.draws.chance(2):
        b.add(f"torch.zeros_like({x}).index_add(0, {target}, {message})")
    else:
        b.add(f"{x}.scatter_add(0, {target}[:, None].expand(-1, {x.shape[1]}), {message})")
