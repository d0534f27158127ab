"""Shared nodes, segments and their structural kinds, and the fingerprint of a trace.

The compute nodes (those that are not shared) stand in a line. A cut before position i costs the number of values made
before i and still needed at or after i. A position is a candidate where that number is the least of the `WINDOW`
positions on one of its sides: between the halves of a decoder layer one value crosses (the residual stream), in a
decoder with cross attention also the encoder's output and the position bias, but never the inside of a layer. From
the candidates, cuts are taken so that every segment has a heavy op. All of it is linear in the number of nodes.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from shardplan.planner.trace import Segment, Source, Trace, infos, is_tensor, module_path, mutated, needs_grad

WINDOW = 64

HEAVY = frozenset(
    "linear addmm mm bmm matmul baddbmm einsum addbmm mv dot bilinear _grouped_mm grouped_mm conv1d conv2d conv3d "
    "convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention embedding "
    "embedding_bag lstm gru rnn_tanh rnn_relu".split()
)
EMBEDDINGS = frozenset({"embedding", "embedding_bag"})
EPILOGUES = frozenset(
    "relu gelu silu tanh sigmoid elu leaky_relu hardtanh hardswish mish softplus dropout batch_norm max_pool2d "
    "avg_pool2d max_pool1d avg_pool1d".split()
)


def fill_segments(trace: Trace) -> None:
    """Set `shared`, `segments` and `fingerprint` of a trace whose graph is final."""
    trace.shared = shared_nodes(trace)
    compute = [n for n in trace.nodes() if n.op == "call_function" and n.name not in trace.shared]
    bounds = _cuts(compute)
    parts = [compute[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    kinds: dict[str, int] = {}
    numbers = [kinds.setdefault(structure(part, trace), len(kinds)) for part in parts]
    names = _names(parts, trace)
    trace.segments = tuple(
        Segment(name, kind, tuple(n.name for n in part)) for name, kind, part in zip(names, numbers, parts, strict=True)
    )
    trace.fingerprint = fingerprint(trace)


def shared_nodes(trace: Trace) -> frozenset[str]:
    """Names of the ops that depend on no parameter, random number or buffer that changes."""
    changed = {buffer for node in trace.nodes() for buffer in mutated(node)}
    tainted: set[fx.Node] = set()
    found: list[str] = []
    for node in trace.nodes():
        if node.op == "placeholder":
            if trace.sources[node.name].kind == "param" or node in changed:
                tainted.add(node)
        elif node.op == "call_function":
            if _is_random(node) or mutated(node) or any(a in tainted for a in node.all_input_nodes):
                tainted.add(node)
            else:
                found.append(node.name)
    return frozenset(found)


def _is_random(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not operator.getitem
    return torch.Tag.nondeterministic_seeded in node.target.tags


# -- cuts --------------------------------------------------------------------------------------------------------------


def _op(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def is_heavy(node: fx.Node) -> bool:
    """Matrix products, convolutions, attention, embeddings, and every op that is not PyTorch's own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return _op(node) in HEAVY or node.target.namespace not in ("aten", "prims", "prim")


def _crossings(compute: Sequence[fx.Node]) -> list[int]:
    """Per position, how many values cross a cut there. Between an op and its getitems: more than anywhere else."""
    position = {node: i for i, node in enumerate(compute)}
    change = [0] * (len(compute) + 1)
    for i, node in enumerate(compute):
        last = max((position[user] for user in node.users if user in position), default=i)
        weight = 1 if is_tensor(node) else len(compute)
        if last > i:
            change[i + 1] += weight
            change[last + 1] -= weight
    total, found = 0, []
    for step in change[: len(compute)]:
        total += step
        found.append(total)
    return found


def _window_minimum(values: Sequence[int], window: int) -> list[int]:
    """Minimum of each value and the `window` before it."""
    kept: deque[int] = deque()
    found = []
    for i, value in enumerate(values):
        while kept and values[kept[-1]] >= value:
            kept.pop()
        kept.append(i)
        if kept[0] < i - window:
            kept.popleft()
        found.append(values[kept[0]])
    return found


def _cuts(compute: Sequence[fx.Node]) -> list[int]:
    """Bounds of the segments, 0 and len(compute) included."""
    if not compute:
        return [0]
    costs = _crossings(compute)[1:]
    left = _window_minimum(costs, WINDOW)
    right = _window_minimum(costs[::-1], WINDOW)[::-1]
    candidates = [i + 1 for i, cost in enumerate(costs) if cost <= max(left[i], right[i])]
    heavy = [i for i, node in enumerate(compute) if is_heavy(node)]
    bounds = [0]
    allowed = set(candidates)
    upcoming = iter([*heavy, len(compute)])
    following = next(upcoming)
    for candidate in candidates:
        if candidate <= bounds[-1]:
            continue
        seen = following
        while following < candidate:
            seen, following = following, next(upcoming)
        del seen
        if following == len(compute) or not _has_heavy(compute[bounds[-1] : candidate]):
            continue
        cut = candidate
        while cut + 1 in allowed and _finishes(compute[cut], compute[cut - 1]):
            cut += 1
        bounds.append(cut)
    bounds.append(len(compute))
    return _merge_embeddings(compute, bounds)


def _has_heavy(part: Iterable[fx.Node]) -> bool:
    return any(is_heavy(node) for node in part)


def _finishes(node: fx.Node, before: fx.Node) -> bool:
    """Whether a light op belongs to what comes before it: an activation, or a norm of the same module."""
    if is_heavy(node):
        return False
    if _op(node) in EPILOGUES:
        return True
    here, there = module_path(node), module_path(before)
    parent = here.rpartition(".")[0]
    return bool(there) and (here == there or parent == there)


def _merge_embeddings(compute: Sequence[fx.Node], bounds: list[int]) -> list[int]:
    """Embeddings that are added up (tokens, positions, types) stay together."""

    def embeds(start: int, stop: int) -> bool:
        return all(_op(node) in EMBEDDINGS for node in compute[start:stop] if is_heavy(node))

    kept = [bounds[0]]
    for before, bound, after in zip(bounds, bounds[1:], bounds[2:], strict=False):
        if not (embeds(before, bound) and embeds(bound, after)):
            kept.append(bound)
    return [*kept, bounds[-1]] if len(bounds) > 1 else kept


# -- kinds and fingerprint ---------------------------------------------------------------------------------------------


def structure(part: Sequence[fx.Node], trace: Trace) -> str:
    """Text that two segments share exactly if they are the same, node by node: ops, static arguments, shapes, dtypes,
    wiring, how each outside value comes in (in order of first use), and which values leave."""
    inside = {node: i for i, node in enumerate(part)}
    outside: dict[fx.Node, int] = {}
    output = next(node for node in reversed(trace.graph.nodes) if node.op == "output")
    lines = []
    for node in part:
        lines.append(_entry(node, inside, outside))
        returned = sum(1 for item in output.args[0] if item is node) if output in node.users else 0  # type: ignore[union-attr]
        leaves = any(user not in inside and user is not output for user in node.users)
        lines.append(f"returned {returned} leaves {leaves}")
    for node in outside:
        if node.op == "placeholder":
            source = trace.sources[node.name]
            how = f"{source.kind} {source.trainable} {source.batch_dim}"
        else:
            how = "shared" if node.name in trace.shared else "carried"
        lines.append(f"{how}: {_facts(node)}")
    return "\n".join(lines)


def _entry(node: fx.Node, inside: dict[fx.Node, int], outside: dict[fx.Node, int]) -> str:
    def encode(value: Any) -> str:
        if isinstance(value, fx.Node):
            if value in inside:
                return f"%{inside[value]}"
            return f"<{outside.setdefault(value, len(outside))}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(encode(item) for item in value) + "]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}={encode(item)}" for key, item in sorted(value.items())) + "}"
        return "device" if isinstance(value, torch.device) else repr(value)

    target = getattr(node.target, "__name__", "") if node.target is operator.getitem else str(node.target)
    return f"{target}{encode(node.args)}{encode(dict(node.kwargs))} -> {_facts(node)}"


def _facts(node: fx.Node) -> str:
    return ";".join(f"{t.dtype}{list(t.shape)}{'*' if t.needs_grad else ''}" for t in infos(node))


def fingerprint(trace: Trace) -> str:
    """Sixteen hexadecimal digits that change with the ops, shapes, dtypes, wiring, constants, parameter names and
    segments, and with nothing else (not with devices, processes or weights)."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        digest.update(text.encode())
        digest.update(b"\n")

    index = {node: i for i, node in enumerate(trace.nodes())}
    add(f"training {trace.training} batch {trace.batch_size} leaves {trace.output_leaves} loss {trace.loss_leaf}")
    for node in trace.nodes():
        if node.op == "placeholder":
            add(f"{_source_text(trace.sources[node.name])} {_facts(node)}")
            if node.name in trace.constants:
                add(_content(trace.constants[node.name]))
        elif node.op == "call_function":
            add(node.name + " " + _entry(node, index, {}))
            add(" ".join(str(index[buffer]) for buffer in mutated(node)))
        else:
            add(" ".join(str(index[a]) if isinstance(a, fx.Node) else repr(a) for a in node.args[0]))  # type: ignore[union-attr]
    for segment in trace.segments:
        add(f"{segment.name} {segment.kind} {len(segment.nodes)}")
    return digest.hexdigest()[:16]


def _source_text(source: Source) -> str:
    return f"{source.kind} {source.name} {source.aliases} {source.trainable} {source.batch_dim} {source.leaf}"


def _content(value: torch.Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat
    return hashlib.sha256(bytes(raw.tolist()) if flat.numel() < 4096 else raw.numpy().tobytes()).hexdigest()


# -- names -------------------------------------------------------------------------------------------------------------


def _names(parts: Sequence[Sequence[fx.Node]], trace: Trace) -> list[str]:
    """Common module of each segment's heavy ops; its children's names where that is not enough; a number at last."""
    output = next(node for node in reversed(trace.graph.nodes) if node.op == "output")
    loss = output.args[0][0]  # type: ignore[index]
    paths = [[module_path(n) for n in part if is_heavy(n)] or [module_path(n) for n in part] for part in parts]
    names = [_common(group) for group in paths]
    for name, count in Counter(names).items():
        if count > 1:
            for i, group in enumerate(paths):
                if names[i] == name:
                    names[i] = _with_children(name, group)
    names = [name or "root" for name in names]
    names = [f"{name}+loss" if loss in part else name for name, part in zip(names, parts, strict=True)]
    seen: Counter[str] = Counter()
    total = Counter(names)
    for i, name in enumerate(names):
        if total[name] > 1:
            seen[name] += 1
            names[i] = f"{name}#{seen[name]}"
    return names


def _common(paths: Sequence[str]) -> str:
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _with_children(name: str, paths: Sequence[str]) -> str:
    """ "blocks.0" of ["blocks.0.qkv", "blocks.0.proj"] -> "blocks.0.qkv+proj"."""
    start = len(name) + 1 if name else 0
    children = list(dict.fromkeys(path[start:].split(".")[0] for path in paths if len(path) > len(name)))
    label = "+".join(children if len(children) < 3 else [children[0], children[-1]])
    return ".".join(part for part in (name, label) if part)
