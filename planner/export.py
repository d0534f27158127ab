"""`trace_model`: from a model and an example batch to a Trace."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from shardplan.errors import NotSupported, NotTraceable, UsageError
from shardplan.planner.capture import PLAIN, Captured, Wrapper, capture
from shardplan.planner.data_checks import Answers, settle
from shardplan.planner.leaf_nodes import annotate, prove_splits
from shardplan.planner.leaves import Leaves
from shardplan.planner.passes import Draft, drop_checks, normalize, selections
from shardplan.planner.passes.draft import not_traceable, packet
from shardplan.planner.passes.inline_regions import mark_switched
from shardplan.planner.passes.verify import known_target
from shardplan.planner.precision import compute_dtype
from shardplan.planner.segments import fill_segments
from shardplan.planner.shadow import CannotCopy, fake_like, make_fake_mode, shadow, without_caches
from shardplan.planner.trace import (
    Source,
    Trace,
    info,
    infos,
    leaf_of,
    mutated,
    needs_grad,
    set_leaf,
    set_mutated,
    set_needs_grad,
    set_result_grads,
)

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def trace_model(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    target: Any = None,
    training: bool = True,
    evaluate: bool | None = None,
    leaves: Sequence[str] | Mapping[str, str] = (),
    precision: str | None = None,
) -> Trace:
    """Trace one call ``model(*args, **kwargs)`` with its loss. Its weights are not copied; it is not run, leaves aside.

    model: real or on the meta device. args, kwargs: a global batch (real, meta or fake tensors; other values are
        constants of the trace). Dim 0 of the first tensor with a dim is the global batch size, and every input whose
        dim 0 has that size carries the batch.
    loss_fn, target: the loss is ``loss_fn(output, target)``, else the model's own (scalar output, attribute or key
        "loss").
    training: with a loss and gradients; False: the loss may be missing (None).
    evaluate: put the model in eval mode, rather than trace it in the mode that its modules are in; default: where it is
        not trained.
    leaves: globs of submodules to keep whole, or `Trace.leaves` of another call of the model. Those in which tracing
        fails are kept whole as well; where there are any, a copy of the modules is run once on the example, if it and
        the model have values.
    precision: see `planner.precision`.

    Raises UsageError for wrong arguments or a missing loss, NotTraceable for what cannot be one graph.
    """
    started = time.perf_counter()
    kwargs = in_order(model, kwargs or {}) if isinstance(model, nn.Module) else kwargs
    _check_arguments(model, args, kwargs, loss_fn, target, training)
    evaluate = not training if evaluate is None else evaluate
    dtype = compute_dtype(precision)
    if dtype is not None and leaves:
        raise NotSupported(f"precision={precision!r} with a leaf", [], ["a leaf runs in the dtypes of its own modules"])
    kept = Leaves(model, args, kwargs, training, evaluate)
    kept.ask(leaves)
    while True:
        try:
            draft, captured = _normalized(model, (args, kwargs, target), loss_fn, kept, dtype)
            break
        except NotTraceable as error:
            if dtype is not None or not kept.take(error):
                raise kept.last_word(error) from error
    _note_devices(draft)
    trace = _finish(draft, captured, pytree.tree_structure((args, kwargs)), _batch_size((args, kwargs)))
    trace.model_name = type(model).__name__
    trace.precision = precision
    trace.masters = _masters(trace, model)
    if trace.masters:
        count = len(trace.masters)
        trace.notes.append(f"computed in {dtype}: {count} parameters are rounded once a step from float32 masters")
    prove_splits(trace, kept)
    fill_segments(trace)
    trace.seconds = time.perf_counter() - started
    return trace


def in_order(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the order of the model's signature, those that it does not name by name: equal calls become
    equal traces."""
    try:
        named = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        named = []
    places = {name: place for place, name in enumerate(named)}
    return {name: kwargs[name] for name in sorted(kwargs, key=lambda name: (places.get(name, len(places)), name))}


def _masters(trace: Trace, model: nn.Module) -> dict[str, torch.dtype]:
    """Name of every parameter that is not used in the dtype that it has -> that dtype."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: named[name].dtype for name, node in trace.parameters().items() if named[name].dtype != info(node).dtype
    }


def _normalized(
    model: nn.Module, call: tuple[Any, Any, Any], loss_fn: Any, kept: Leaves, dtype: torch.dtype | None
) -> tuple[Draft, Captured]:
    """call: (args, kwargs, target)."""
    fake_mode = make_fake_mode()
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: fake_like(fake_mode, t), call)
    captured = _capture(model, inputs, loss_fn, kept, fake_mode, dtype)
    kept.check_called()
    notes = [*captured.notes, *dict.fromkeys(captured.wrapper.packing.remarks)]
    if kept.training and not model.training:
        notes.append("the model is in eval mode: dropout is off and running statistics are used, not updated")
    draft = _draft(captured, model, inputs, notes, kept.training)
    annotate(draft.graph, kept)
    normalize(draft)
    for node, value in draft.constants.items():
        if isinstance(value, FakeTensor) and node.users:
            raise not_traceable(_reader(node), "makes a tensor in a way that tracing cannot follow")
    return draft, captured


def _check_arguments(model: Any, args: Any, kwargs: Any, loss_fn: Any, target: Any, training: bool) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {type(model).__name__}, not an nn.Module")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(value, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise UsageError(f"{name} has no shape yet", [], ["run the model once on a small batch"])
        if getattr(value, "_backward_hooks", None) or getattr(value, "_post_accumulate_grad_hooks", None):
            raise NotSupported(f"{name} has a hook on its gradient", [], ["remove it: gradients are cut up and summed"])
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS) or type(module).__name__ == "FullyShardedDataParallel":
            raise UsageError(f"{name or 'the model'} is a {type(module).__name__}", [], ["pass the module inside it"])
    if not isinstance(args, tuple):
        raise UsageError(f"args is {type(args).__name__}, not a tuple of positional arguments")
    if loss_fn is not None and not callable(loss_fn):
        raise UsageError(f"loss_fn is {type(loss_fn).__name__}, not callable")
    if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
        raise UsageError("loss_fn has parameters of its own", [], ["make it a part of the model"])
    if training and loss_fn is not None and target is None:
        raise UsageError("loss_fn is given but no target", [], ["pass target=..., the second argument of loss_fn"])
    if loss_fn is None and target is not None:
        raise UsageError("target is given but no loss_fn", [], ["pass loss_fn=f with f(output, target)"])
    for leaf in pytree.tree_leaves((args, kwargs, target)):
        if not isinstance(leaf, (torch.Tensor, *PLAIN)):
            raise UsageError(
                f"a {type(leaf).__name__} among the inputs: only tensors and plain values in tuples, lists and dicts",
                [],
                [f"register {type(leaf).__name__} with torch.utils._pytree.register_pytree_node"],
            )
    if not any(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in pytree.tree_leaves((args, kwargs))):
        raise UsageError("no tensor with a batch dim among the example inputs")


def _batch_size(inputs: Any) -> int:
    leaves = pytree.tree_leaves(inputs[:2])
    return next(int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)


def _capture(
    model: nn.Module, inputs: Any, loss_fn: Any, kept: Leaves, fake_mode: Any, dtype: torch.dtype | None
) -> Captured:
    """Trace a copy of the modules; the model itself where it cannot be copied or the loss function holds on to it."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}

    def attempt(copied: bool, answers: Answers) -> Captured:
        with shadow(model, fake_mode, copied, dtype) as traced, without_caches(traced), kept.installed(traced):
            if kept.evaluate:
                traced.eval()
            return capture(Wrapper(traced, loss_fn, kept.training, dtype), inputs, fake_mode, answers)

    for copied in (True, False):
        try:
            found, notes = settle(partial(attempt, copied))
        except CannotCopy:
            continue
        found.notes.extend(notes)
        constants = [value for kind, value in found.kinds.values() if kind == "constant"]
        if not any(value.untyped_storage()._cdata in own for value in constants):
            return found
    raise NotTraceable("the loss function holds tensors of the model that could not be traced")


# -- from what was captured to a draft ---------------------------------------------------------------------------------


def _draft(captured: Captured, model: nn.Module, inputs: Any, notes: list[str], training: bool) -> Draft:
    """The captured graph with a Source for every placeholder; placeholders that are not tensors become literals."""
    draft = Draft(captured.module, {}, {}, captured.fake_mode, training, notes)
    for part in captured.module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.meta["nn_module_stack"] = _module_stack(node)
    mark_switched(captured.module.graph)
    canonical = _canonical_names(model)
    labels = _input_labels(model, inputs)
    leaves = pytree.tree_leaves(inputs)
    batch_size = _batch_size(inputs)
    call_leaves = len(pytree.tree_leaves(inputs[:2]))
    first: dict[str, fx.Node] = {}
    for node in [n for n in captured.module.graph.nodes if n.op == "placeholder"]:
        kind, what = captured.kinds[node.name]
        if kind in ("param", "buffer"):
            name, aliases = canonical[what.removeprefix("model.")]
            if name in first:
                draft.replace(node, first[name])
                continue
            first[name] = node
            draft.sources[node] = Source(kind, name, aliases, _trainable(model, name) if kind == "param" else False)
        elif kind == "constant":
            if what.device.type == "meta":
                raise NotTraceable(
                    "the model makes a tensor from numbers on the meta device, where they are lost",
                    [],
                    ["build the model with shardplan.meta_model(factory), which keeps such tensors"],
                )
            draft.sources[node] = Source("constant", f"constant_{len(draft.constants)}")
            draft.constants[node] = what.detach()
        elif kind == "object":
            raise not_traceable(_reader(node), "reads an object that is neither a tensor nor a number")
        elif isinstance(leaves[what], torch.Tensor):
            carries = leaves[what].ndim > 0 and leaves[what].shape[0] == batch_size
            leaf = what if what < call_leaves else -1
            draft.sources[node] = Source("input", labels[what], batch_dim=0 if carries else None, leaf=leaf)
            if not carries:
                draft.note(
                    f"input {labels[what]} {list(leaves[what].shape)} has no batch dim: every device gets all of it"
                )
        else:
            _to_literal(node, leaves[what])
            captured.module.graph.erase_node(node)
    _flatten_output(captured)
    drop_checks.drop(captured.module.graph)
    selections.apply(draft)
    for node in draft.ops():
        if not known_target(node.target):
            called = getattr(node.target, "__name__", node.target)
            raise not_traceable(node, f"calls {called}, which is not an operator")
    _refuse_unknown_sizes(captured.module)
    return draft


def _reader(node: fx.Node) -> fx.Node:
    """The first node that reads a value: it tells which module that was."""
    return next(iter(node.users), node)


def _canonical_names(model: nn.Module) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Any name of a parameter or buffer -> (its first name, all its other names)."""
    groups: dict[int, list[str]] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        groups.setdefault(id(value), []).append(name)
    return {name: (names[0], tuple(names[1:])) for names in groups.values() for name in names}


def _trainable(model: nn.Module, name: str) -> bool:
    return bool(model.get_parameter(name).requires_grad)


def _input_labels(model: nn.Module, inputs: Any) -> list[str]:
    """A readable name per leaf of (args, kwargs, target): positional arguments by the name that forward gives them."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    labels = []
    for path, _ in pytree.tree_flatten_with_path(inputs)[0]:
        keys: list[Any] = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
        if keys[0] == 2:
            keys = ["target", *keys[1:]]
        elif keys[0] == 0 and keys[1] < len(positional):
            keys = [positional[keys[1]], *keys[2:]]
        elif keys[0] == 0:
            keys = ["args", *keys[1:]]
        else:
            keys = keys[1:]
        label = ".".join(map(str, keys))
        labels.append(label if label not in labels else f"{label}#{len(labels)}")
    return labels


def _to_literal(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args, user.kwargs = _substituted((user.args, user.kwargs), node, value)


def _substituted(container: Any, node: fx.Node, value: Any) -> Any:
    return pytree.tree_map(lambda leaf: value if leaf is node else leaf, container)


def _flatten_output(captured: Captured) -> None:
    output = next(n for n in reversed(captured.module.graph.nodes) if n.op == "output")
    returned = output.args[0]
    output.args = (tuple(returned) if isinstance(returned, (tuple, list)) else (returned,),)


def _refuse_unknown_sizes(module: fx.GraphModule) -> None:
    """Sizes and numbers that depend on data have no place in a static plan."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sized = value.shape if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(extent, (torch.SymInt, torch.SymFloat, torch.SymBool)) for extent in sized):
                raise not_traceable(node, "makes a size or number that depends on the numbers in a tensor")


def _note_devices(draft: Draft) -> None:
    """Tell of ops that name another device than the parameters are on."""
    home = {node.meta["val"].device.type for node, source in draft.sources.items() if source.kind == "param"}
    named: set[str] = set()
    for node in draft.ops():
        named |= {v.type for v in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(v, torch.device)}
    if home and named - home:
        draft.note(
            f"some ops name the device {', '.join(sorted(named - home))}; the parameters are on {sorted(home)[0]}"
        )


# -- from a draft to a trace -------------------------------------------------------------------------------------------


def _finish(draft: Draft, captured: Captured, in_spec: Any, batch_size: int) -> Trace:
    """A fresh graph: placeholders in a fixed order, names that depend on the ops alone, and only the meta we use."""
    packing = captured.wrapper.packing
    order = {"param": 0, "buffer": 1, "constant": 2, "input": 3}
    placeholders = sorted(draft.sources, key=lambda n: order[draft.sources[n].kind])
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    sources: dict[str, Source] = {}
    constants: dict[str, torch.Tensor] = {}
    for node in placeholders:
        source = draft.sources[node]
        new = made[node] = graph.create_node("placeholder", _identifier(source.name), name=_identifier(source.name))
        new.target = new.name
        sources[new.name] = source
        if node in draft.constants:
            constants[new.name] = draft.constants[node]
        _keep_meta(node, new, made)
    for node in draft.graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: made[n])
            label = packet(node).split(".")[-1].strip("_") or getattr(node.target, "__name__", "op")
            made[node] = graph.create_node("call_function", node.target, args, kwargs, name=label)
            _keep_meta(node, made[node], made)
        elif node.op == "output":
            graph.output(map_arg(node.args[0], lambda n: made[n]))
    module = fx.GraphModule(nn.Module(), graph, class_name="Traced")
    loss = next(iter(_output_args(graph)), None)
    if draft.training and isinstance(loss, fx.Node) and not needs_grad(loss):
        raise UsageError("the loss does not depend on any trainable parameter")
    return Trace(
        module=module,
        sources=sources,
        constants=constants,
        in_spec=in_spec,
        out_spec=packing.out_spec,
        output_leaves=packing.leaves,
        loss_leaf=packing.loss_leaf,
        batch_size=batch_size,
        training=draft.training,
        method=captured.method,
        notes=draft.notes,
    )


def _output_args(graph: fx.Graph) -> tuple[Any, ...]:
    return next(n for n in reversed(graph.nodes) if n.op == "output").args[0]  # type: ignore[return-value]


def _identifier(name: str) -> str:
    made = re.sub(r"\W", "_", name)
    return f"_{made}" if made[:1].isdigit() else made


def _keep_meta(old: fx.Node, new: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
    new.meta["val"] = old.meta.get("val")
    for key in ("nn_module_stack", "stack_trace"):
        new.meta[key] = old.meta.get(key)
    note = leaf_of(old)
    if note is not None:
        set_leaf(new, note)
        set_result_grads(new, tuple(found.needs_grad for found in infos(old)))
    set_needs_grad(new, needs_grad(old))
    if mutated(old):
        set_mutated(new, tuple(made[buffer] for buffer in mutated(old)))


def _module_stack(node: fx.Node) -> dict[str, tuple[str, str]]:
    """The stack of modules by the names they have in the user's model, outermost first."""
    found: dict[str, tuple[str, str]] = {}
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path, kind = entry[0], entry[1] if isinstance(entry[1], str) else entry[1].__qualname__
        path = re.sub(r"@\d+", "", path)
        if path == "model" or path.startswith("model."):
            path = path[len("model.") :]
            found[path] = (path, kind)
    return found
