"""Batches as users pass them, and as the runtime takes them: input name -> tensor.

A call is put into one form first: whatever ``forward`` names is passed by name, in the order of its signature, so that
``pm(ids)`` and ``pm(input_ids=ids)`` are the same call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardplan.errors import InputMismatch, UsageError
from shardplan.planner.plan import input_texts
from shardplan.planner.trace import TensorInfo, Trace, info
from shardplan.runtime.inputs import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of the model: ``loss_fn(model(*args, **kwargs), target)``."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Any = None

    def whole(self) -> Batch:
        """With a tensor without data in the place of every input of which only some rows are here."""
        values = pytree.tree_map_only(Rows, _meta, (self.args, self.kwargs, self.target))
        return Batch(*values)

    def on_meta(self) -> Batch:
        """The same shapes and dtypes without data."""
        values = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (self.args, self.kwargs, self.target))
        return Batch(*values)


def _meta(rows: Rows) -> torch.Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device="meta")


def example_batch(model: torch.nn.Module, example: Any, has_loss_fn: bool) -> Batch:
    """The batch that ``example_inputs=`` means.

    example: a tensor, a tuple of positional inputs, or a dict of inputs by name. With a loss_fn the target is the
    dict's "target" or the tuple's last item. Raises UsageError.
    """
    if isinstance(example, Batch):
        return canonical(model, example.args, example.kwargs, example.target)
    if isinstance(example, Mapping):
        named = dict(example)
        target = named.pop("target", None) if has_loss_fn else None
        return canonical(model, (), named, target)
    items = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not has_loss_fn:
        return canonical(model, items, {}, None)
    if len(items) < 2:
        raise UsageError(
            "loss_fn is given, but the example has no target",
            hints=["example_inputs=(x, y)", 'example_inputs={"x": x, "target": y}'],
        )
    return canonical(model, items[:-1], {}, items[-1])


def canonical(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> Batch:
    """The call with everything that ``model.forward`` names passed by name. Raises InputMismatch for arguments that it
    does not take."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputMismatch(f"{type(model).__name__}.forward does not take these inputs", [str(error)]) from error
    except ValueError:
        return Batch(args, dict(kwargs), target)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    spread = inspect.Parameter.VAR_POSITIONAL in kinds.values() and any(
        kinds[name] is inspect.Parameter.VAR_POSITIONAL and value for name, value in bound.arguments.items()
    )
    for name, value in bound.arguments.items():
        kind = kinds[name]
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= dict(sorted(value.items()))
        elif kind is inspect.Parameter.POSITIONAL_ONLY or (spread and kind is inspect.Parameter.POSITIONAL_OR_KEYWORD):
            positional.append(value)
        else:
            named[name] = value
    return Batch(tuple(positional), named, target)


Signature = tuple[tuple[str, str], ...]


def signature(batch: Batch) -> Signature:
    """What tells calls apart: path and shape or value of every leaf."""
    return tuple((path, _text(leaf)) for path, leaf in _leaves_of_call(batch).items() if leaf is not None)


class Inputs:
    """The inputs that a trace was made for; checks batches and takes them apart."""

    def __init__(self, trace: Trace, example: Batch, traced_target: Any) -> None:
        self._infos = {s.name: info(trace.node(n)) for n, s in trace.sources.items() if s.kind == "input"}
        self._carriers = {s.name for s in trace.sources.values() if s.kind == "input" and s.batch_dim == 0}
        self._by_leaf = {s.leaf: s.name for s in trace.sources.values() if s.kind == "input" and s.leaf >= 0}
        self._example = _leaves_of_call(Batch(example.args, example.kwargs))
        assert trace.in_spec is not None
        args, kwargs = pytree.tree_unflatten(range(trace.in_spec.num_leaves), trace.in_spec)
        self._positions: dict[str, int] = _leaves(args, kwargs)
        self._has_target = traced_target is not None
        self.signature = signature(Batch(example.args, example.kwargs, traced_target))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensor inputs, the target's included."""
        return tuple(self._infos)

    def texts(self) -> dict[str, str]:
        """As `Plan.inputs` writes them."""
        return input_texts(
            (name, held.shape, str(held.dtype).removeprefix("torch.")) for name, held in self._infos.items()
        )

    def check(self, batch: Batch, training: bool) -> None:
        """Whether a batch can be a call of the same model, perhaps of other sizes.

        Raises InputMismatch, which names the input: another dtype or number of dims, inputs that carry different
        numbers of samples, and in training inputs that are missing.
        """
        if training and (batch.target is not None) != self._has_target:
            raise InputMismatch(
                "target is missing" if self._has_target else "target is given, but the plan has no loss_fn",
                hints=["train_step(*inputs, target=y)"] if self._has_target else ["pass loss_fn= to auto_parallel"],
            )
        given = {name: value for name, value in self._named(batch)}
        samples: dict[int, str] = {}
        for name, planned in self._infos.items():
            value = given.get(name)
            if value is None:
                if training:
                    raise InputMismatch(f"input {name} is missing", [f"planned for {_of(planned)}"])
                continue
            if not isinstance(value, torch.Tensor) or (value.dtype, value.ndim) != (planned.dtype, len(planned.shape)):
                raise InputMismatch(f"input {name} is {_text(value)}, planned for {_of(planned)}")
            if name in self._carriers:
                samples.setdefault(value.shape[0], name)
        if len(samples) > 1:
            raise InputMismatch(
                "the inputs carry different numbers of samples",
                [f"{name}: {count}" for count, name in samples.items()],
            )

    def part_of(self, batch: Batch) -> frozenset[str] | None:
        """Names of the batch's tensors, if it is the planned call, perhaps without some inputs (labels); else None."""
        mine = dict(self.signature)
        given = signature(batch)
        if any(mine.get(path) != text for path, text in given):
            return None
        constants = {p for p, leaf in self._example.items() if leaf is not None and not isinstance(leaf, torch.Tensor)}
        if constants - {path for path, _ in given}:
            return None
        return frozenset(name for name, value in self._named(batch) if value is not None)

    def bind(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Input name -> tensor, for a batch of this very call; devices may differ."""
        return {name: value for name, value in self._named(batch) if value is not None}

    def _named(self, batch: Batch) -> Iterator[tuple[str, Any]]:
        """(input name, value) of what the trace reads; values that were tensors in the example may be anything."""
        for path, value in _leaves(batch.args, batch.kwargs).items():
            name = self._by_leaf.get(self._positions.get(path, -1))
            if name is not None:
                yield name, value
        for path, value in _leaves_of(batch.target).items():
            name = f"target.{path}" if path else "target"
            if name in self._infos:
                yield name, value


def rebuild_output(trace: Trace, outputs: Mapping[int, torch.Tensor]) -> Any:
    """The model's output from its tensors by position in the trace's output; tensors that were not computed (a loss
    without labels) are None."""
    leaves = [outputs.get(leaf) if isinstance(leaf, int) else leaf[0] for leaf in trace.output_leaves]
    return pytree.tree_unflatten(leaves, trace.out_spec)


def move(value: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `to` to every tensor in a structure."""
    return pytree.tree_map_only(torch.Tensor, to, value)


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Readable path -> leaf of (args, kwargs), in pytree order."""
    paths, _ = pytree.tree_flatten_with_path((args, dict(kwargs)))
    return {".".join(map(_key, path[0 if path[0].idx == 0 else 1 :])): leaf for path, leaf in paths}  # type: ignore[attr-defined]


def _leaves_of_call(batch: Batch) -> dict[str, Any]:
    target = {f"target.{path}" if path else "target": leaf for path, leaf in _leaves_of(batch.target).items()}
    return _leaves(batch.args, batch.kwargs) | (target if batch.target is not None else {})


def _leaves_of(value: Any) -> dict[str, Any]:
    return {".".join(map(_key, path)): leaf for path, leaf in pytree.tree_flatten_with_path(value)[0]}


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _of(value: TensorInfo) -> str:
    return _text(torch.empty(value.shape, dtype=value.dtype, device="meta"))


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    return f"{type(value).__name__} {value!r}" if value is not None else "None"
