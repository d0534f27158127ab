"""Statements: linear maps, products, convolutions, attention, whole submodules."""

from __future__ import annotations

from tests.fuzz.builder import Builder, Skip


def linear(b: Builder) -> None:
    x = b.ranked(1)
    out = b.extent()
    bias = f", {b.param((out,))}" if b.draws.chance(2) else ""
    b.add(f"F.linear({x}, {b.param((out, x.shape[-1]))}{bias})")


def matmul_parameter(b: Builder) -> None:
    x = b.ranked(1)
    n = b.extent()
    form = b.draws.below(5)
    if form == 0:
        b.add(f"{x} @ {b.param((x.shape[-1], n))}")
    elif form == 1:
        b.add(f"{x} @ {b.param((x.shape[-1],))}")
    elif form == 2 and x.rank > 1:
        b.add(f"{b.param((n, x.shape[-2]))} @ {x}")
    elif form == 3 and x.rank > 1:
        b.add(f"{b.param((x.shape[-2],))} @ {x}")
    elif form == 4 and x.rank > 2:
        b.add(f"torch.matmul({x}, {b.param((*x.shape[:-2], x.shape[-1], n))})")
    else:
        raise Skip


def matmul_values(b: Builder) -> None:
    x = b.ranked(1)
    form = b.draws.below(4)
    if form == 0:
        y = b.pick(lambda v: v.rank > 1 and v.shape[-1] == x.shape[-1])
        b.add(f"{x} @ {y}.mT")
    elif form == 1:
        y = b.pick(lambda v: v.rank > 0 and v.shape[-2 if v.rank > 1 else -1] == x.shape[-1])
        b.add(f"{x} @ {y}")
    elif form == 2:
        y = b.pick(lambda v: v.rank == 3 and x.rank == 3 and (v.shape[0], v.shape[1]) == (x.shape[0], x.shape[2]))
        b.add(f"torch.bmm({x}, {y})")
    else:
        y = b.pick(lambda v: v.rank == 1)
        z = b.pick(lambda v: v.rank == 1)
        b.add(f"torch.outer({y}, {z})")


def added_product(b: Builder) -> None:
    x = b.pick(lambda v: v.rank in (2, 3))
    n = b.extent()
    rows = (1, x.shape[-2])[b.draws.below(2)]
    scales = b.draws.one(("", ", beta=0.5", ", alpha=2.0, beta=0.5"))
    if x.rank == 2:
        bias = b.draws.one(((n,), (rows, n)))
        b.add(f"torch.addmm({b.param(bias)}, {x}, {b.param((x.shape[1], n))}{scales})")
    else:
        bias = ((1, x.shape[0])[b.draws.below(2)], rows, n)
        weight = (x.shape[0], x.shape[2], n)
        b.add(f"torch.baddbmm({b.param(bias)}, {x}, {b.param(weight)}{scales})")


def einsum(b: Builder) -> None:
    """A value and a parameter (or a second value) with random letters; any of them may be left out of the result."""
    x = b.ranked(1, 4)
    letters = "abcd"[: x.rank]
    extents = dict(zip(letters, x.shape, strict=True))
    if b.draws.chance(3):
        y = b.ranked(1, 4)
        word, free = "", iter("efgh")
        for extent in y.shape:
            same = [c for c in letters if extents[c] == extent and c not in word]
            chosen = b.draws.one(same) if same and not b.draws.chance(4) else next(free)
            extents[chosen] = extent
            word += chosen
        other = str(y)
    else:
        word = "".join(c for c in letters if b.draws.chance(2))
        if b.draws.chance(2):
            extents["e"] = b.extent()
            word = f"e{word}" if b.draws.chance(2) else f"{word}e"
        if not word:
            raise Skip
        other = b.param([extents[c] for c in word])
    everything = list(dict.fromkeys(letters + word))
    result = [c for c in everything if not b.draws.chance(3)]
    for i in range(len(result)):
        j = b.draws.below(len(result) - i)
        result[i], result[i + j] = result[i + j], result[i]
    b.add(f"torch.einsum('{letters},{word}->{''.join(result)}', {x}, {other})")


def convolution(b: Builder) -> None:
    x = b.pick(lambda v: v.rank in (3, 4))
    dims = x.rank - 2
    channels = x.shape[1]
    groups = b.draws.one([g for g in (1, 2, 3, 4) if channels % g == 0])
    out = groups * b.draws.one((2, 1, 3))
    kernel = [b.draws.one((3, 1, 2)) for _ in range(dims)]
    options = b.draws.one((", padding=1", "", ", stride=2", ", padding='same'", ", padding=1, stride=2"))
    options += f", groups={groups}" if groups > 1 else ""
    if b.draws.chance(4):
        options = options.replace(", padding='same'", "")
        weight = b.param((channels, out // groups, *kernel))
        b.add(f"F.conv_transpose{dims}d({x}, {weight}{options})")
        return
    bias = b.param((out,)) if b.draws.chance(2) else "None"
    b.add(f"F.conv{dims}d({x}, {b.param((out, channels // groups, *kernel))}, {bias}{options})")


def pool(b: Builder) -> None:
    x = b.pick(lambda v: v.rank in (3, 4))
    d = x.rank - 2
    b.add(
        b.draws.one(
            (
                f"F.avg_pool{d}d({x}, 2)",
                f"F.max_pool{d}d({x}, 2)",
                f"F.adaptive_avg_pool{d}d({x}, 1)",
                f"F.interpolate({x}, scale_factor=2.0, mode='nearest')",
                f"F.max_pool{d}d({x}, 3, stride=1, padding=1)",
                f"F.adaptive_max_pool{d}d({x}, 2)",
            )
        )
    )


def embedding(b: Builder) -> None:
    ids = b.pick(lambda v: v.rank < 4, "int")
    need = int(b.tensor(ids).max()) + 1
    if int(b.tensor(ids).min()) < 0:
        raise Skip
    tables = [t for t in b.tables if t.shape[0] >= need]
    if tables and b.draws.chance(2):
        table = b.draws.one(tables).name
    else:
        table = b.param((max(need, b.draws.one((8, 6, 12))), b.extent()))
        b.tables.append(next(p for p in b.params if p.name == table))
    padding = f", padding_idx={b.draws.below(need)}" if b.draws.chance(4) else ""
    b.add(f"F.embedding({ids}, {table}{padding})")


def tied_head(b: Builder) -> None:
    """A product with the transpose of an embedding table."""
    table = b.draws.one(b.tables)
    x = b.pick(lambda v: v.rank > 0 and v.shape[-1] == table.shape[1])
    b.add(f"F.linear({x}, {table})")


def attention(b: Builder) -> None:
    """Heads are made by views of linear maps of [b, s, e], as models do."""
    x = b.pick(lambda v: v.rank == 3)
    batch, length, width = x.shape
    heads, size = b.draws.one((2, 4, 3, 1)), b.draws.one((2, 4, 3))
    grouped = b.draws.one([g for g in (1, 2) if heads % g == 0])
    named = []
    for count in (heads, heads // grouped, heads // grouped):
        weight = b.param((count * size, width))
        y = b.add(f"F.linear({x}, {weight}).view({batch}, {length}, {count}, {size}).transpose(1, 2)")
        named.append(y.name)
    masks = (
        "",
        ", is_causal=True",
        f", attn_mask=torch.ones({length}, {length}, dtype=torch.bool).tril()",
        f", attn_mask={b.param((heads, length, length)) if b.draws.chance(2) else b.param((length, length))}",
    )
    options = b.draws.one(masks) + (", enable_gqa=True" if grouped > 1 else "")
    y = b.add(f"F.scaled_dot_product_attention({', '.join(named)}{options})")
    if b.draws.chance(2):
        b.add(f"{y}.transpose(1, 2).reshape({batch}, {length}, {heads * size})")


def fused_attention(b: Builder) -> None:
    """One projection to query, key and value, taken apart by chunk or split."""
    x = b.pick(lambda v: v.rank == 3)
    width = x.shape[2]
    heads, size = b.draws.one((2, 4)), b.draws.one((2, 3))
    inner = heads * size
    y = b.add(f"F.linear({x}, {b.param((3 * inner, width))})")
    take = b.draws.one((f"{y}.chunk(3, dim=-1)", f"{y}.split([{inner}, {inner}, {inner}], dim=2)"))
    parts = b.add_several(take, 3)
    q, k, v = (f"{p}.unflatten(-1, ({heads}, {size})).transpose(1, 2)" for p in parts)
    z = b.add(f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal={b.draws.chance(2)})")
    b.add(f"{z}.transpose(1, 2).flatten(2)")


def module(b: Builder) -> None:
    """A submodule with its own parameters and, for some, statistics that it writes."""
    x = b.ranked(2, 4)
    last, channels = x.shape[-1], x.shape[1]
    n = b.extent()
    options = [
        f"nn.Linear({last}, {n}, dtype=D)",
        f"nn.LayerNorm({last}, dtype=D)",
        f"nn.Sequential(nn.Linear({last}, {n}, dtype=D), nn.GELU(), nn.Linear({n}, {last}, dtype=D))",
        f"nn.RMSNorm({last}, dtype=D)",
        f"nn.GroupNorm({b.draws.one([g for g in (1, 2, 3, 4, 8) if channels % g == 0])}, {channels}, dtype=D)",
        f"nn.PReLU({channels if b.draws.chance(2) else 1}, dtype=D)",
    ]
    if x.rank < 4:
        options.append(f"nn.BatchNorm1d({channels}, dtype=D)")
    if x.rank == 4:
        options += [f"nn.BatchNorm2d({channels}, dtype=D)", f"nn.Conv2d({channels}, {n}, 3, padding=1, dtype=D)"]
    if x.rank == 3:
        options += [
            f"nn.Conv1d({channels}, {n}, 1, dtype=D)",
            f"nn.InstanceNorm1d({channels}, affine=True, dtype=D)",
        ]
    if x.rank == 3 and last % 2 == 0:
        layer = f"nn.TransformerEncoderLayer({last}, 2, {2 * last}, dropout=0.0, batch_first=True, dtype=D)"
        options += [layer]
    name = b.submodule(b.draws.one(options))
    y = b.add(f"{name}({x})")
    if b.draws.chance(4) and y.shape == x.shape:
        b.add(f"{name}({y}) + {x}")


def recurrent(b: Builder) -> None:
    x = b.pick(lambda v: v.rank == 3)
    kind, n = b.draws.one(("GRU", "LSTM", "RNN")), b.draws.one((4, 3))
    first = b.draws.one((True, False))
    name = b.submodule(f"nn.{kind}({x.shape[-1]}, {n}, batch_first={first}, dtype=D)")
    b.add(f"{name}({x})[0]")


def normalise(b: Builder) -> None:
    """Functional normalisations and softmax."""
    x = b.ranked(1)
    last = x.shape[-1]
    form = b.draws.below(8)
    dim = b.dim(x)
    if form == 0:
        b.add(f"F.softmax({x}, dim={dim})")
    elif form == 1:
        b.add(f"F.log_softmax({x}, dim={dim})")
    elif form == 2:
        b.add(f"F.layer_norm({x}, ({last},), {b.param((last,))}, {b.param((last,))})")
    elif form == 3 and x.rank > 1:
        b.add(f"F.layer_norm({x}, {x.shape[-2:]})")
    elif form == 4:
        b.add(f"F.rms_norm({x}, ({last},), {b.param((last,))})")
    elif form == 5 and x.rank > 1:
        groups = b.draws.one([g for g in (1, 2, 3, 4, 8) if x.shape[1] % g == 0])
        b.add(f"F.group_norm({x}, {groups}, {b.param((x.shape[1],))}, {b.param((x.shape[1],))})")
    elif form == 6:
        b.add(f"F.normalize({x}, dim={dim}, eps=0.1)")
    elif form == 7 and x.rank > 1:
        y = b.pick(lambda v: v.shape == x.shape)
        b.add(f"F.cosine_similarity({x}, {y}, dim={dim}, eps=0.1)")
    else:
        raise Skip
