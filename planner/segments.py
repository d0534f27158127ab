"""Shared nodes, segments and their structural kinds, and the fingerprint of a trace.

Where the segments begin and end: `planner.cuts`.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from shardplan.planner.cuts import find_cuts, is_heavy
from shardplan.planner.trace import Segment, Source, Trace, infos, leaf_of, module_path, mutated


def fill_segments(trace: Trace) -> None:
    """Set `shared`, `segments` and `fingerprint` of a trace whose graph is final."""
    trace.shared = shared_nodes(trace)
    compute = [n for n in trace.nodes() if n.op == "call_function" and n.name not in trace.shared]
    bounds = find_cuts(compute)
    parts = [compute[a:b] for a, b in pairwise(bounds)]
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

    note, args = leaf_of(node), node.args
    if note is not None:
        args = (f"{note.leaf} {note.splits}", *args[1:])  # not the name: layers of one kind are alike
    target = getattr(node.target, "__name__", "") if node.target is operator.getitem else str(node.target)
    return f"{target}{encode(args)}{encode(dict(node.kwargs))} -> {_facts(node)}"


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
    paths = [_paths([n for n in part if is_heavy(n)]) or _paths(part) for part in parts]
    names = [_common(group) for group in paths]
    for whole in (False, True):
        found = list(names)
        for i, group in enumerate(paths):
            if not names[i] or any(_within(other, names[i]) for j, other in enumerate(names) if j != i):
                found[i] = _with_children(_common(group), group, whole)
        names = found
    names = [name or "root" for name in names]
    names = [f"{name}+loss" if loss in part else name for name, part in zip(names, parts, strict=True)]
    seen: Counter[str] = Counter()
    total = Counter(names)
    for i, name in enumerate(names):
        if total[name] > 1:
            seen[name] += 1
            names[i] = f"{name}#{seen[name]}"
    return names


def _paths(nodes: Sequence[fx.Node]) -> list[str]:
    """Module paths of the nodes, without the root where functional ops of its own forward are."""
    return [path for path in map(module_path, nodes) if path]


def _common(paths: Sequence[str]) -> str:
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _with_children(name: str, paths: Sequence[str], whole: bool) -> str:
    """ "blocks.0" of ["blocks.0.qkv", "blocks.0.proj"] -> "blocks.0.qkv+proj"; whole: with all of the paths below."""
    start = len(name) + 1 if name else 0
    below = [path[start:] for path in paths if len(path) > start]
    children = list(dict.fromkeys(below if whole else [path.split(".")[0] for path in below]))
    label = "+".join(children if len(children) < 3 else [children[0], children[-1]])
    return ".".join(part for part in (name, label) if part)
