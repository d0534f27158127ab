"""Submodules that are kept whole while a model is traced: which, why, and what stands for their calls.

A leaf is run for real before it is traced, on what the example batch gives it where model and batch have values (one
forward of a copy of the modules, without gradients, buffers put back), else on random tensors.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from shardplan.errors import NotTraceable, UsageError
from shardplan.planner import casts, leaf_probe
from shardplan.planner.constraints import matches
from shardplan.planner.leaf_op import LEAF, Form, Input, Leaf, held_by, loose_in, results_text, tensor_at
from shardplan.planner.leaf_probe import Facts, Unsuitable
from shardplan.planner.passes.draft import way_out
from shardplan.planner.trace import TensorInfo

ASKED = "asked for"
MOST_ROUNDS = 24
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


class NeedsRun(NotTraceable):
    """A leaf was called that has not been run yet, and the example could not show its inputs. call: what it got."""

    call: _Call


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a leaf. flat: the leaves of (args, kwargs), with an `Input` where a tensor stands."""

    path: str
    number: int
    tensors: tuple[TensorInfo, ...]
    spec: pytree.TreeSpec
    flat: tuple[Any, ...]
    autocast: torch.dtype | None

    @property
    def name(self) -> str:
        return self.path if self.number == 1 else f"{self.path}#{self.number}"


@dataclass(slots=True)
class Known:
    """A leaf that was run. inputs: real tensors of its call; held: its parameters and buffers, with values."""

    facts: Facts
    call: _Call
    inputs: list[torch.Tensor]
    held: list[torch.Tensor]
    recorded: bool


@dataclass(slots=True)
class Leaves:
    """model: the user's. args, kwargs: the example call, as given. training: with gradients; evaluate: in eval mode.

    reasons: path of a leaf -> why it is one; known: name of a call -> what a run of it showed.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    evaluate: bool
    reasons: dict[str, str] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    _seen: dict[tuple[type, str], str] = field(default_factory=dict)
    _asked: list[str] = field(default_factory=list)
    _rounds: int = 0

    def ask(self, globs: Sequence[str] | Mapping[str, str]) -> None:
        """Keep what matches whole: as the user asked, or for the given reasons. Raises NoMatch."""
        modules = dict(self.model.named_modules())
        for glob in globs:
            earlier = isinstance(globs, Mapping)
            reason = globs[glob] if isinstance(globs, Mapping) else ASKED
            found = [path for path in modules if path and fnmatchcase(path, glob)]
            if not found:
                found = [path for path in matches(glob, [p for p in modules if p]) if path in modules]
            for path in found:
                for callable_path in _callable(modules[path], path):
                    self._add(callable_path, reason)
                    if not earlier:
                        self._asked.append(callable_path)
        if globs:
            self._record()

    def take(self, error: NotTraceable) -> bool:
        """Make a leaf of the module in which tracing failed; where it cannot be one, of the module around it.

        False: there is none, or there were too many tries. Raises NotTraceable where not even the outermost can be one.
        """
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            return False
        refusals: list[NotTraceable] = []
        while True:
            try:
                if isinstance(error, NeedsRun):
                    self._run(error.call, None)
                elif not self._keep(error):
                    break
                return True
            except NotTraceable as refused:
                if not refused.module:
                    raise
                refusals.append(refused)
                error = refused
        if refusals:
            raise refusals[0]
        return False

    def _keep(self, error: NotTraceable) -> bool:
        """Make a leaf of the innermost module around the error that is none yet. False: there is none."""
        path = error.module
        while path and (path in self.reasons or any(path.startswith(f"{leaf}.") for leaf in self.reasons)):
            path = path.rpartition(".")[0]  # what is called is not its forward, or it cannot be a leaf
        modules = dict(self.model.named_modules())
        while path and _callable(modules[path], path) != [path]:
            path = path.rpartition(".")[0]
        if not path:
            return False
        reason = self.reasons.get(error.module or "") or (error.details[0] if error.details else error.title)
        self._add(path, reason)
        kind = (type(modules[path]), reason)
        if self._seen.setdefault(kind, path) != path:
            # The second of its class that fails at the same statement: the others will.
            for other, module in modules.items():
                if other and type(module) is kind[0]:
                    self._add(other, reason)
        self._record()
        return True

    def last_word(self, error: NotTraceable) -> NotTraceable:
        """The error for the user, of which no leaf can be made."""
        if not error.module or error.module not in self.reasons:
            return error
        return NotTraceable(error.title, [*error.details, f"{error.module} is kept whole already"], way_out(""))

    def _add(self, path: str, reason: str) -> None:
        if any(path == leaf or path.startswith(f"{leaf}.") for leaf in self.reasons):
            return
        for inner in [leaf for leaf in self.reasons if leaf.startswith(f"{path}.")]:
            del self.reasons[inner]
            for name in [n for n, known in self.known.items() if known.call.path == inner]:
                del self.known[name]
        self.reasons[path] = reason

    # -- real runs -----------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Learn the inputs of all leaves from one run of the model on the example, if both have values."""
        values = [*self.model.parameters(), *self.model.buffers(), *pytree.tree_leaves((self.args, self.kwargs))]
        if any(isinstance(v, torch.Tensor) and (v.is_meta or isinstance(v, FakeTensor)) for v in values):
            return
        calls: list[tuple[_Call, list[torch.Tensor]]] = []
        counts: dict[str, int] = {}
        # The run may do anything to the parameters of leaves, so it gets copies of these.
        inside = {id(p) for path in self.reasons for p in self.model.get_submodule(path).parameters()}
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters() if id(p) not in inside}
        try:
            copied = copy.deepcopy(self.model, memo)
        except Exception:
            return
        if self.evaluate:
            copied.eval()

        def hook(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, kwargs: Any) -> None:
                counts[path] = counts.get(path, 0) + 1
                tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                calls.append((_described(path, counts[path], args, kwargs), [t.detach().clone() for t in tensors]))

            return note

        for path in self.reasons:
            copied.get_submodule(path).register_forward_pre_hook(hook(path), prepend=True, with_kwargs=True)
        with contextlib.suppress(Exception), leaf_probe.drawing(0), torch.no_grad(), casts.as_ops():
            copied(*self.args, **self.kwargs)
        for call, tensors in calls:
            if call.name not in self.known:
                self._run(call, tensors)

    def _run(self, call: _Call, inputs: list[torch.Tensor] | None) -> None:
        module = self.model.get_submodule(call.path)
        leaf = Leaf(
            call.name, _structure(module, self.evaluate), held_by(module), len(call.tensors),
            Form.of(call.spec), call.flat, call.autocast, loose_in(module), digest=_digest(module),
        )  # fmt: skip
        held = [_valued(tensor_at(module, part), i) for i, part in enumerate(leaf.held)]
        try:
            recorded = inputs is not None
            if inputs is None:
                run = lambda tensors: leaf_probe.examine(leaf, tensors, held, self.training)  # noqa: E731
                inputs = leaf_probe.made_up(call.tensors, run)
            facts = leaf_probe.examine(leaf, inputs, held, self.training)
            leaf_probe.check_shapes(facts, inputs, held)
        except Exception as error:
            raise self._refused(call.path, error) from error
        self.known[call.name] = Known(facts, call, inputs, held, recorded)

    def _refused(self, path: str, error: Exception) -> NotTraceable:
        why = f"cannot be run by itself: {type(error).__name__}: {error}"
        if isinstance(error, Unsuitable):
            why = str(error)
        refused = NotTraceable(f"{path} cannot be kept whole: it {why}", [f"kept whole because: {self.reasons[path]}"])
        refused.module = self._grown(path)
        return refused

    def _grown(self, path: str) -> str | None:
        """The leaf, where the module around it may be one in its place: not where the user asked for it."""
        return None if path in self._asked else path

    # -- in the trace --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self, traced: nn.Module) -> Iterator[None]:
        """The leaves of a shadow of the model are calls of one op for as long as the block runs."""
        self.called.clear()
        with contextlib.ExitStack() as undo:
            for path in self.reasons:
                module = traced.get_submodule(path)
                before = dict(vars(module))
                undo.callback(_restore, module, before)
                for table in _HOOKS:
                    if table in before:
                        vars(module)[table] = OrderedDict()
                vars(module)["forward"] = self._forward(path, module)
            yield

    def _forward(self, path: str, module: nn.Module) -> Callable[..., Any]:
        counts = [0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            counts[0] += 1
            try:
                call = _described(path, counts[0], args, kwargs)
            except NotTraceable as error:
                error.module = self._grown(path)
                raise
            known = self.known.get(call.name)
            if known is None or (known.call.tensors, known.call.flat) != (call.tensors, call.flat):
                error = NeedsRun(f"{path} is kept whole and was not run")
                error.call = call
                raise error
            inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            leaf, text = known.facts.leaf, results_text(known.facts.results)
            made = iter(LEAF(call.name, text, [*inputs, *(tensor_at(module, part) for part in leaf.held)]))
            self.called.append(call.name)
            flat = [next(made) if constant is None else constant[0] for constant in leaf.constants]
            return pytree.tree_unflatten(flat, known.facts.returned)

        return forward

    def check_called(self) -> None:
        """Raises UsageError for a leaf that was asked for and that the model does not call."""
        called = {self.known[name].call.path for name in self.called}
        for path in self._asked:
            if path in self.reasons and path not in called:
                raise UsageError(
                    f"leaf({path!r}): the model does not call it", [], ["name the module that is called as a whole"]
                )


def _restore(module: nn.Module, before: Mapping[str, Any]) -> None:
    vars(module).clear()
    vars(module).update(before)


def _described(path: str, number: int, args: Any, kwargs: Any) -> _Call:
    """Raises NotTraceable where a number that depends on data is handed in."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors: list[TensorInfo] = []
    values: list[Any] = []
    for leaf in flat:
        if isinstance(leaf, torch.Tensor):
            values.append(Input(len(tensors)))
            tensors.append(TensorInfo(tuple(int(extent) for extent in leaf.shape), leaf.dtype))
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise NotTraceable(f"{path} is given a number that depends on data")
        else:
            values.append(leaf)
    device_type = next((leaf.device.type for leaf in flat if isinstance(leaf, torch.Tensor)), "cpu")
    device_type = "cpu" if device_type == "meta" else device_type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return _Call(path, number, tuple(tensors), spec, tuple(values), autocast)


def _digest(module: nn.Module) -> str:
    """Of the classes and their code, the configuration that they print, and the shapes of parameters and buffers."""
    told = hashlib.sha256(repr(module).encode())
    for kind in dict.fromkeys(type(part) for part in module.modules()):
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):
            source = ""
        told.update(f"{kind.__module__}.{kind.__qualname__}\n{source}".encode())
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        told.update(f"{name} {value.dtype} {list(value.shape)}".encode())
    return told.hexdigest()[:12]


def _callable(module: nn.Module, path: str) -> list[str]:
    """The module itself, or, of a list or dict of modules, those in it that can be called."""
    if getattr(type(module), "forward", None) is not nn.Module.forward:
        return [path]
    return [found for name, child in module.named_children() for found in _callable(child, f"{path}.{name}")]


def _structure(module: nn.Module, evaluate: bool) -> nn.Module:
    """A copy of the module whose parameters and buffers are on the meta device. Raises whatever copying raises."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        memo.update({id(v): v.detach().clone() for v in vars(part).values() if isinstance(v, torch.Tensor)})
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    made = copy.deepcopy(module, memo)
    if evaluate:
        made.eval()
    return made


def _valued(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The tensor, or random numbers for one without values."""
    if not tensor.is_meta and not isinstance(tensor, FakeTensor):
        return tensor
    described = TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
    return leaf_probe.random_tensor(described, 2, seed).requires_grad_(tensor.requires_grad)
