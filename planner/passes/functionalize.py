"""Rewrite in-place ops as ops that give a new value, through views too; a write to a buffer becomes one `copy_`.

Every storage has a *base* node and a version. A view remembers its base and the chain of view ops that leads to it.
A write to a view makes a new value of the view, writes it back through the chain into a new value of the base, and
raises the version; whoever reads the base or any view of it later gets it rebuilt from the newest value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardplan.planner.passes.draft import Draft, aten_ops, not_traceable, packet
from shardplan.planner.rules.views import PERMUTES, order_of
from shardplan.planner.trace import needs_grad as flows
from shardplan.planner.trace import set_mutated, set_needs_grad

name = "functionalize"

aten = torch.ops.aten

# Composite ops that change arguments without saying so in their schema: (flag that turns it on, changed arguments).
# Forms that give a new value, where they go by another name than the in-place op's without its underscore.
_OTHER_NAMES = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.normal_.default: aten.normal_functional.default,
}
SILENT = {"aten.batch_norm": (5, (3, 4)), "aten.instance_norm": (5, (3, 4))}


@dataclass(eq=False)
class Storage:
    """base: the node that made the storage; values: view chain (of template nodes) -> its value at `version`."""

    base: fx.Node
    version: int = 0
    values: dict[tuple[fx.Node, ...], fx.Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alias:
    storage: Storage
    chain: tuple[fx.Node, ...]


def apply(draft: Draft) -> None:
    _mark_silent(draft)
    if any(_writes(node) for node in draft.ops()):
        _Functionalizer(draft).run()


def _mark_silent(draft: Draft) -> None:
    for node in draft.ops():
        flag, changed = SILENT.get(packet(node), (-1, ()))
        if flag >= 0 and len(node.args) > flag and node.args[flag]:
            buffers = tuple(a for a in (node.args[i] for i in changed) if isinstance(a, fx.Node))
            if any(buffer.op != "placeholder" for buffer in buffers):
                raise not_traceable(node, "keeps running statistics in something that is not a buffer")
            set_mutated(node, buffers)


def _writes(node: fx.Node) -> list[fx.Node]:
    """Arguments that the op's schema says it writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            found += [item for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in found if isinstance(item, fx.Node)]


class _Functionalizer:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.aliases: dict[fx.Node, Alias] = {}
        # By identity of the traced memory; the values are kept so that no identity is used twice.
        self.storages: dict[int, Storage] = {}
        self.held: list[Any] = []

    def run(self) -> None:
        for node in list(self.draft.graph.nodes):
            if node.op == "placeholder":
                self._own(node)
            elif node.op in ("call_function", "output"):
                self._refresh(node)
                if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.inplace_view in node.target.tags:
                    node.target = self._functional_overload(node)
                if _writes(node):
                    self._write(node)
                elif node.op == "call_function":
                    self._track(node)

    def _own(self, node: fx.Node) -> None:
        storage = Storage(node, 0, {(): node})
        self.aliases[node] = Alias(storage, ())
        for memory in _memory(node):
            self.storages[memory] = storage
        self.held.append(node.meta.get("val"))

    def _track(self, node: fx.Node) -> None:
        """Record whether the node is a view of an argument or owns its storage."""
        memory = _memory(node)
        for argument in node.all_input_nodes:
            source = self.aliases.get(argument)
            if source is None:
                continue
            if node.target is operator.getitem and not source.chain:
                break
            if node.target is operator.getitem or any(self.storages.get(m) is source.storage for m in memory):
                alias = self.aliases[node] = Alias(source.storage, (*source.chain, node))
                alias.storage.values[alias.chain] = node
                return
        self._own(node)

    def _refresh(self, node: fx.Node) -> None:
        for argument in node.all_input_nodes:
            alias = self.aliases.get(argument)
            if alias is not None and alias.storage.version and argument is not alias.storage.values.get(alias.chain):
                node.replace_input_with(argument, self._value(alias, node))

    def _value(self, alias: Alias, before: fx.Node) -> fx.Node:
        """The newest value of a view, rebuilt from that of its base where need be."""
        storage = alias.storage
        known = storage.values.get(alias.chain)
        if known is not None:
            return known
        template = alias.chain[-1]
        parent = self._value(Alias(storage, alias.chain[:-1]), before)
        viewed = next(n for n in template.all_input_nodes if n in self.aliases and self.aliases[n].storage is storage)
        args, kwargs = map_arg((template.args, template.kwargs), lambda n: parent if n is viewed else n)
        made = self.draft.emit(before, template.target, *args, like=template, **kwargs)  # type: ignore[arg-type]
        set_needs_grad(made, flows(template))
        self.aliases[made] = alias
        storage.values[alias.chain] = made
        return made

    def _write(self, node: fx.Node) -> None:
        written = _writes(node)
        if len(written) != 1 or written[0] is not node.args[0] or written[0] not in self.aliases:
            raise not_traceable(node, f"calls {node.target}, which writes to more than its first argument")
        alias = self.aliases[written[0]]
        storage = alias.storage
        source = self.draft.sources.get(storage.base)
        if source is not None and source.kind == "param":
            raise not_traceable(node, f"changes the parameter {source.name} in forward")
        unseen = bool(node.meta.get("no_grad"))
        needed = any(flows(argument) for argument in node.all_input_nodes) and not unseen
        value = self._functional(node, written[0])
        node.meta["no_grad"] = False  # what puts the value in its place is seen by autograd
        if unseen and flows(written[0]):
            value, unseen = self._unseen(node, written[0], value), False
        chain = alias.chain
        fresh = {chain: value}
        while chain:
            pieces = chain[-1].target is operator.getitem
            inner, chain = chain, chain[: -2 if pieces else -1]
            parent = self._value(Alias(storage, chain), node)
            if pieces:
                value = self._put_back_piece(node, inner[-2], parent, value, int(inner[-1].args[1]))  # type: ignore[arg-type]
            else:
                value = self._put_back(node, inner[-1], parent, value)
            unseen = unseen or packet(inner[-1]) == "aten.detach"
            if unseen and flows(parent):
                value, unseen = self._unseen(node, parent, value), False
            fresh[chain] = value
        storage.version += 1
        storage.values = fresh
        for part, made in fresh.items():
            self.aliases[made] = Alias(storage, part)
            set_needs_grad(made, needed or flows(storage.base))
        node.replace_all_uses_with(fresh[alias.chain])
        if source is not None and source.kind == "buffer":
            base = storage.base
            kept = self.draft.emit(node, aten.copy_.default, base, value, like=node)
            set_mutated(kept, (base,))
        elif source is not None and source.kind == "input":
            self.draft.note(f"the model changes its input {source.name} in place; the caller's tensor stays as it is")
        self.draft.graph.erase_node(node)

    def _unseen(self, node: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
        """`value` with the gradient of `held`: autograd did not see this write, under no_grad or through detach."""
        emit = self.draft.emit
        cut = emit(node, aten.detach.default, held, like=node)
        nothing = emit(node, aten.sub.Tensor, held, cut, like=node)
        return emit(node, aten.add.Tensor, emit(node, aten.detach.default, value, like=node), nothing, like=node)

    def _functional(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The value that the written tensor has afterwards, in its own dtype and shape."""
        emit, held = self.draft.emit, target.meta["val"]
        op = packet(node)
        args: tuple[Any, ...] = node.args
        if op == "aten.copy_" or (op == "aten.fill_" and isinstance(args[1], fx.Node)):
            # An alias, because a node stands for a value of one storage only.
            value = emit(node, aten.alias.default, args[1], like=node)
        elif op == "aten.fill_":
            return emit(node, aten.full_like.default, target, args[1], like=node)
        elif op == "aten.zero_":
            return emit(node, aten.zeros_like.default, target, like=node)
        else:
            if op == "aten.bernoulli_" and len(args) < 2:
                args = (*args, 0.5)
            value = emit(node, self._functional_overload(node), *args, like=node, **node.kwargs)
        if value.meta["val"].dtype != held.dtype:
            value = emit(node, aten.to.dtype, value, held.dtype, like=node)
        if value.meta["val"].shape != held.shape:
            value = emit(node, aten.expand.default, value, list(held.shape), like=node)
        return value

    def _functional_overload(self, node: fx.Node) -> Callable[..., Any]:
        assert isinstance(node.target, torch._ops.OpOverload)
        if node.target in _OTHER_NAMES:
            return _OTHER_NAMES[node.target]
        base = node.target._schema.name.split("::")[1]
        if base.startswith("__i"):
            base = "__" + base[3:]
        found = getattr(getattr(torch.ops, node.target.namespace), base.rstrip("_") if base[:2] != "__" else base, None)
        overload = getattr(found, node.target._overloadname, None) if found is not None else None
        if overload is None or overload._schema.is_mutable:
            raise not_traceable(node, f"calls {node.target}, which has no form that leaves its arguments alone")
        return overload

    def _put_back(self, node: fx.Node, template: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """`parent` with the part that `template` views replaced by `value`."""
        emit, before = self.draft.emit, parent.meta["val"]
        op, args = packet(template), template.args[1:]
        if op == "aten.slice":
            return self._overwrite(node, aten.slice_scatter.default, parent, value, *args)
        if op == "aten.narrow":
            dim, start, length = args
            return self._overwrite(node, aten.slice_scatter.default, parent, value, dim, start, start + length)  # type: ignore[operator]
        if op == "aten.select":
            return self._overwrite(node, aten.select_scatter.default, parent, value, *args)
        if op == "aten.diagonal":
            return self._overwrite(node, aten.diagonal_scatter.default, parent, value, *args)
        if template.target in PERMUTES and template.target is not aten.mH.default:
            dims = order_of(template, before.ndim)
            return emit(node, aten.permute.default, value, [dims.index(d) for d in range(before.ndim)], like=node)
        if before.numel() == value.meta["val"].numel() and op in _RESHAPES:
            return emit(node, aten.reshape.default, value, list(before.shape), like=node)
        raise not_traceable(node, f"writes through a view made by {template.target}")

    def _put_back_piece(self, node: fx.Node, template: fx.Node, parent: fx.Node, value: fx.Node, i: int) -> fx.Node:
        """As `_put_back` for result number i of an op with several results."""
        op, pieces = packet(template), template.meta["val"]
        if op not in ("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.unbind", "aten.tensor_split"):
            raise not_traceable(node, f"writes to a result of {template.target}")
        position = 1 if op == "aten.unbind" else 2
        dim = template.args[position] if len(template.args) > position else template.kwargs.get("dim", 0)
        if op == "aten.unbind":
            return self._overwrite(node, aten.select_scatter.default, parent, value, dim, i)
        start = sum(piece.shape[dim] for piece in pieces[:i])
        stop = start + pieces[i].shape[dim]
        return self._overwrite(node, aten.slice_scatter.default, parent, value, dim, start, stop)

    def _overwrite(self, node: fx.Node, scatter: Any, parent: fx.Node, value: fx.Node, *args: Any) -> fx.Node:
        """A scatter of `value` into `parent`. Complex numbers go by their real parts: autograd knows these ops for real
        numbers only."""
        emit, held = self.draft.emit, parent.meta["val"]
        if not held.is_complex():
            return emit(node, scatter, parent, value, *args, like=node)
        given = {a.name: a.default_value for a in scatter._schema.arguments[2:]}
        given |= dict(zip(given, args, strict=False))
        for name in {"dim", "dim1", "dim2"} & given.keys():
            given[name] %= held.ndim  # there is one more dim behind
        parts = []
        for complex_ in (parent, value):
            if complex_.meta["val"].is_conj():
                complex_ = emit(node, aten.resolve_conj.default, complex_, like=node)
            parts.append(emit(node, aten.view_as_real.default, complex_, like=node))
        if scatter is aten.diagonal_scatter.default:  # a diagonal becomes the last dim
            parts[1] = emit(node, aten.transpose.int, parts[1], -1, -2, like=node)
        made = emit(node, scatter, *parts, *given.values(), like=node)
        return emit(node, aten.view_as_complex.default, made, like=node)


_RESHAPES = aten_ops(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze alias detach contiguous to clone expand "
    "view_as reshape_as expand_as lift_fresh"
)


def _memory(node: fx.Node) -> list[int]:
    """Identity of the memory behind the node's traced value or values."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [part.untyped_storage()._cdata for part in parts if isinstance(part, torch.Tensor)]
