"""The op ``shardplan::leaf``: a submodule that stands in the graph whole, and `Leaf`, which runs it.

In a traced graph a leaf is a call of the op with its name, the description of its results, and its tensors: first the
tensors among the arguments of the call, then the parameters and buffers of the submodule. A rank calls the `Leaf`
instead, on its local tensors, under ordinary autograd.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from shardplan.errors import LeafChanged
from shardplan.planner import casts

_LIBRARY = torch.library.Library("shardplan", "FRAGMENT")
# The tag keeps passes from merging two calls or taking one for a constant: what is inside may draw random numbers.
_LIBRARY.define("leaf(str name, str results, Tensor[] tensors) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))

LEAF = torch.ops.shardplan.leaf.default

_RESULT = re.compile(r"^(\w+)\[([\d,]*)\](\*?)$")
# The tensors of a leaf are put into its modules for as long as it runs, and simulated ranks are threads.
RUNNING = threading.RLock()


@dataclass(frozen=True, slots=True)
class LeafResult:
    """One tensor that a leaf returns. differentiable: whether autograd links it to the leaf's tensors.

    Prints as ``float32[4,8]*`` (the star: differentiable) and parses back.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}[{','.join(map(str, self.shape))}]{'*' if self.differentiable else ''}"

    @staticmethod
    def parse(text: str) -> LeafResult:
        """Inverse of ``str(result)``. Raises ValueError."""
        found = _RESULT.match(text)
        if not found:
            raise ValueError(f"not the result of a leaf: {text!r}")
        shape = tuple(int(extent) for extent in found[2].split(",") if extent)
        return LeafResult(shape, getattr(torch, found[1]), bool(found[3]))


def results_text(results: Sequence[LeafResult]) -> str:
    return ";".join(map(str, results))


def parse_results(text: str) -> tuple[LeafResult, ...]:
    """Inverse of `results_text`."""
    return tuple(LeafResult.parse(part) for part in text.split(";") if part)


@torch.library.register_fake("shardplan::leaf", lib=_LIBRARY)
def _fake(name: str, results: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    device = tensors[0].device if tensors else torch.device("cpu")
    return [torch.empty(r.shape, dtype=r.dtype, device=device) for r in parse_results(results)]


def is_leaf(node: fx.Node) -> bool:
    """Whether the node is a submodule kept whole."""
    return node.op == "call_function" and node.target is LEAF


def leaf_results(node: fx.Node) -> tuple[LeafResult, ...]:
    """What the leaf at a node returns (global shapes)."""
    return parse_results(str(node.args[1]))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module holds a tensor. table: "_parameters", "_buffers", or "" for a plain attribute; index: the position
    in a list that is an attribute (the flat weights of recurrent modules), or -1."""

    module: str
    attribute: str
    table: str
    index: int = -1


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or buffer of a leaf. name: within the leaf's module."""

    name: str
    is_parameter: bool
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """Stands for the tensor of that position among the arguments of a leaf."""

    position: int


@dataclass(frozen=True, slots=True)
class Form:
    """The structure of a pytree as plain data, which every version of PyTorch pickles. kind: None for a leaf."""

    kind: Any
    context: Any = None
    parts: tuple[Form, ...] = ()

    @staticmethod
    def of(spec: pytree.TreeSpec) -> Form:
        if spec.is_leaf():
            return Form(None)
        children = spec.children() if hasattr(spec, "children") else spec.children_specs
        return Form(spec.type, spec.context, tuple(map(Form.of, children)))

    def spec(self) -> pytree.TreeSpec:
        if self.kind is None:
            return pytree.tree_structure(0)
        return pytree.TreeSpec(self.kind, self.context, [part.spec() for part in self.parts])


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A submodule that is run whole, called with tensors in the order of the op's argument ``tensors``.

    name: the submodule's qualified name, with ``#2`` for its second call.
    module: the submodule without values (its parameters and buffers on the meta device).
    held: its parameters and buffers, each once, behind the `inputs` tensors of the call.
    form, values: the call's (args, kwargs): its structure, and its leaves with an `Input` where a tensor stands.
    autocast: dtype of the autocast region in which the module was called, or None.
    loose: tensors that it holds as plain attributes; they have values and follow the device.
    grad: the module runs with gradients enabled even where nobody wants any (it calls autograd itself).
    later: its backward runs modules, or gives parameters their gradients itself (reversible layers): it is one function
        for autograd, and its modules hold in the backward what they held at the end of the forward.
    constants: per leaf of what the module returns: None for a tensor, else a tuple of the plain value.
    ranges: least and largest entry of every integer among the tensors, as the example had them (None for others).
    flops: of the forward run on the example; results: how many numbers it gave.
    digest: tells leaves of different code or form apart; equal for the layers of one kind.
    """

    name: str
    module: nn.Module
    held: tuple[Held, ...]
    inputs: int
    form: Form
    values: tuple[Any, ...]
    autocast: torch.dtype | None = None
    loose: tuple[Place, ...] = ()
    grad: bool = False
    later: bool = False
    constants: tuple[tuple[Any] | None, ...] = ()
    ranges: tuple[tuple[int, int] | None, ...] = ()
    flops: float = 0.0
    results: int = 0
    digest: str = ""

    def __str__(self) -> str:
        return f"leaf {type(self.module).__qualname__} {self.digest}"

    def call(self, *tensors: torch.Tensor) -> Any:
        """What the module returns."""
        if self.later and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            form: list[Any] = []
            made = _Later.apply(self, form, *tensors)
            flat, spec = form
            kept = iter(made)
            return pytree.tree_unflatten([next(kept) if isinstance(v, torch.Tensor) else v for v in flat], spec)
        return self._run(tensors, None)

    def _run(self, tensors: Sequence[torch.Tensor], after: list[tuple[Any, Any]] | None) -> Any:
        """after: is given what the module holds at the end."""
        flat = [tensors[value.position] if isinstance(value, Input) else value for value in self.values]
        args, kwargs = pytree.tree_unflatten(flat, self.form.spec())
        device_type = tensors[0].device.type if tensors else "cpu"
        region = torch.autocast(device_type, dtype=self.autocast) if self.autocast else contextlib.nullcontext()
        silent = self.grad and not torch.is_grad_enabled()
        graded = torch.enable_grad() if silent else contextlib.nullcontext()
        if tensors:
            _move(self.module, self.loose, tensors[0].device)
        filled = _filled(self, tensors[self.inputs :])
        with RUNNING, _as_before(self.module), filled, region, graded, casts.as_ops():
            returned = self.module(*args, **kwargs)
            if after is not None:
                after.extend(_attributes(self.module))
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, returned) if silent else returned

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that the module returns. Raises LeafChanged where it returns something else beside them than
        when it was traced."""
        flat = pytree.tree_leaves(self.call(*tensors))
        found = tuple(None if isinstance(leaf, torch.Tensor) else (plain(leaf),) for leaf in flat)
        if found != self.constants:
            raise LeafChanged(
                f"{self.name} returned other values than when it was traced",
                [f"now: {_show(found)}", f"traced: {_show(self.constants)}"],
                ["numbers that depend on data have to be tensors"],
            )
        return tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))


PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def plain(value: Any) -> Any:
    """A value that a graph can hold; None for others."""
    return value if isinstance(value, PLAIN) else None


def _show(constants: Sequence[tuple[Any] | None]) -> str:
    return ", ".join("tensor" if value is None else repr(value[0]) for value in constants)


def held_by(module: nn.Module) -> tuple[Held, ...]:
    """The parameters and buffers of a module, each once, with everywhere it is held."""
    places: dict[int, list[Place]] = {}
    names: dict[int, tuple[str, bool]] = {}
    for path, part in module.named_modules():
        for table in ("_parameters", "_buffers"):
            for attribute, value in getattr(part, table).items():
                if value is not None:
                    places.setdefault(id(value), []).append(Place(path, attribute, table))
                    full = f"{path}.{attribute}" if path else attribute
                    names.setdefault(id(value), (full, table == "_parameters"))
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            found = [(-1, value)] if isinstance(value, torch.Tensor) else []
            if isinstance(value, list):
                found = [(i, v) for i, v in enumerate(value) if isinstance(v, torch.Tensor)]
            for index, tensor in found:
                if id(tensor) in places:
                    places[id(tensor)].append(Place(path, attribute, "", index))
    ordered = sorted(names, key=lambda key: not names[key][1])  # parameters first
    return tuple(Held(*names[key], tuple(places[key])) for key in ordered)


def loose_in(module: nn.Module) -> tuple[Place, ...]:
    """Tensors that a module holds as plain attributes, parameters and buffers aside."""
    known = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    return tuple(
        Place(path, attribute, "")
        for path, part in module.named_modules()
        for attribute, value in vars(part).items()
        if isinstance(value, torch.Tensor) and id(value) not in known
    )


def _move(module: nn.Module, places: Sequence[Place], device: torch.device) -> None:
    for place in places:
        held = vars(module.get_submodule(place.module))
        value = held.get(place.attribute)  # the module may have replaced it
        if isinstance(value, torch.Tensor) and value.device != device:
            held[place.attribute] = value.to(device)


def tensor_at(module: nn.Module, held: Held) -> torch.Tensor:
    """The tensor that a module holds now."""
    place = held.places[0]
    return getattr(module.get_submodule(place.module), place.table)[place.attribute]


class _Later(torch.autograd.Function):
    """A leaf with a graph of its own that ends at its tensors: all that its backward adds to their gradients counts."""

    @staticmethod
    def forward(ctx: Any, leaf: Leaf, form: list[Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """form: is given the leaves of what the module returns, and their structure."""
        own = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        after: list[tuple[Any, Any]] = []
        with torch.enable_grad():
            flat, spec = pytree.tree_flatten(leaf._run(own, after))
        form += [flat, spec]
        made = [value for value in flat if isinstance(value, torch.Tensor)]
        results = [value.detach() for value in made]
        ctx.mark_non_differentiable(*(r for r, m in zip(results, made, strict=True) if not m.requires_grad))
        ctx.set_materialize_grads(False)
        ctx.module, ctx.own, ctx.made, ctx.after = leaf.module, own, made, after
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        outs = [(m, g) for m, g in zip(ctx.made, gradients, strict=True) if m.requires_grad and g is not None]
        devices = {tensor.device for tensor in ctx.own if tensor.device.type == "cuda"}
        with RUNNING, torch.random.fork_rng(devices), _as_before(ctx.module):
            _put_back(ctx.after)
            torch.autograd.backward([m for m, _ in outs], [g for _, g in outs])
        return None, None, *(tensor.grad for tensor in ctx.own)


def _attributes(module: nn.Module) -> list[tuple[Any, Any]]:
    """The attributes of a module and of those in it, and all lists, dicts and sets in these, each with a copy."""
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    waiting: list[Any] = [vars(part) for part in module.modules()]
    while waiting:
        container = waiting.pop()
        if id(container) not in seen:
            seen.add(id(container))
            found.append((container, copy.copy(container)))
            within = container.values() if isinstance(container, dict) else container
            waiting.extend(value for value in within if isinstance(value, (dict, list, set, deque)))
    return found


def _put_back(attributes: Sequence[tuple[Any, Any]]) -> None:
    for container, before in attributes:
        container.clear()
        if isinstance(container, (dict, set)):
            container.update(before)
        else:
            container.extend(before)


@contextlib.contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Undo what the module sets on itself while the block runs, or changes in lists, dicts and sets that it holds.
    A state that a call leaves behind would link the backward of the next call to its own."""
    before = _attributes(module)
    try:
        yield
    finally:
        _put_back(before)


@contextlib.contextmanager
def _filled(leaf: Leaf, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """The leaf's module with these parameters and buffers. A buffer that the module replaces by another tensor is
    written back."""
    before = [tensor_at(leaf.module, held) for held in leaf.held]
    for held, tensor in zip(leaf.held, tensors, strict=True):
        _put(leaf.module, held, tensor)
    try:
        yield
        for held, tensor in zip(leaf.held, tensors, strict=True):
            now = tensor_at(leaf.module, held)
            if now is not tensor and not held.is_parameter:
                with torch.no_grad():
                    tensor.copy_(now)
    finally:
        for held, tensor in zip(leaf.held, before, strict=True):
            _put(leaf.module, held, tensor)


def _put(module: nn.Module, held: Held, tensor: torch.Tensor) -> None:
    for place in held.places:
        owner = module.get_submodule(place.module)
        if place.table:
            getattr(owner, place.table)[place.attribute] = tensor
        elif place.index < 0:
            vars(owner)[place.attribute] = tensor
        else:
            vars(owner)[place.attribute][place.index] = tensor
