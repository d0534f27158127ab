"""Get a flat graph out of a model: `torch.export` on fake weights, `make_fx` where that fails, and errors with a place.

The model is never run on data and its weights are never copied: a shadow of it, the same modules holding fake tensors,
is traced. Models on the meta device are traced as if they were on the CPU, so that literals keep their values.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext, tracing
from torch.utils import _pytree as pytree

from shardplan.errors import NotTraceable, UsageError
from shardplan.planner import casts, precision, vmaps
from shardplan.planner.custom_backward import is_plain
from shardplan.planner.data_checks import Answers
from shardplan.planner.passes.draft import way_out
from shardplan.planner.shadow import fake_like

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


class CustomBackward(Exception):
    """A custom autograd.Function was called."""


class DataDependent(Exception):
    """Python needed to know the numbers in a tensor."""


@dataclass
class Captured:
    """module: graph with placeholders; kinds: placeholder name -> (kind, name | leaf index | value).

    kind "param" and "buffer": qualified name in the shadow; "constant": the tensor; "input": index among the leaves of
    (args, kwargs, target); "object": what is neither a tensor nor a number. outputs: what the model returned, by
    `wrapper.packing`.
    """

    module: fx.GraphModule
    kinds: dict[str, tuple[str, Any]]
    wrapper: Wrapper
    fake_mode: Any
    method: str
    notes: list[str] = field(default_factory=list)


@dataclass
class Packing:
    """How the model's output was taken apart; the fields are those of Trace. remarks: notes for the user.

    An object of its own, because export puts back attributes that a module assigns while it is traced.
    """

    out_spec: Any = None
    leaves: tuple[int | tuple[Any, ...], ...] = ()
    loss_leaf: int | None = None
    remarks: list[str] = field(default_factory=list)


class Wrapper(nn.Module):
    """Calls the model and returns (loss or None, *tensor leaves of the output); `packing` says what they were. dtype:
    of its parameters where that is not their own, see `planner.precision`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        need_loss: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = model
        # In a list, so that the buffers of a loss module become constants of the trace.
        self.loss_fn = [loss_fn]
        self.need_loss = need_loss
        self.packing = Packing()
        self.training = model.training

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Any, ...]:
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        try:
            output, loss = self._call(args, kwargs, target)
        except GuardOnDataDependentSymNode as error:
            # Export would print the whole graph for the original.
            raise DataDependent(str(error)) from error
        return self._pack(output, loss)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Any, torch.Tensor | None]:
        output = precision.call(self.model, self.dtype, *args, **kwargs)
        loss_fn = self.loss_fn[0]
        if loss_fn is not None and target is not None:
            loss = loss_fn(output, target)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise UsageError(f"loss_fn returned {_describe(loss)}, not a scalar tensor")
        else:
            loss = self._own_loss(output)
        return output, loss

    def _pack(self, output: Any, loss: torch.Tensor | None) -> tuple[Any, ...]:
        packing = self.packing
        packing.loss_leaf = None
        leaves, packing.out_spec = pytree.tree_flatten(output)
        tensors: list[torch.Tensor] = []
        places: list[int | tuple[Any, ...]] = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if leaf is loss:
                    packing.loss_leaf = position
                tensors.append(leaf)
                places.append(len(tensors))
            elif isinstance(leaf, PLAIN):
                places.append((leaf,))
            else:
                packing.remarks.append(f"a {type(leaf).__name__} in the model's output is returned as None")
                places.append((None,))
        packing.leaves = tuple(places)
        if isinstance(loss, torch.Tensor) and loss.ndim > 0:
            loss = loss.reshape(())
        return (loss, *tensors)

    def _own_loss(self, output: Any) -> torch.Tensor | None:
        found = own_loss(output)
        if found is None and self.need_loss:
            kind = _describe(output)
            raise UsageError(
                "output is not a scalar loss and no loss_fn is given",
                [f"the model returned {kind}"],
                [
                    "pass loss_fn=f with f(output, target)",
                    "pass the inputs that make the model compute its loss (labels=...)",
                ],
            )
        return found


def own_loss(output: Any) -> torch.Tensor | None:
    """The loss that a model returned: a scalar tensor, an attribute or key "loss", or the scalar first of a tuple."""
    if isinstance(output, dict):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "loss"):
        found = output[0] if output else None
    else:
        found = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if isinstance(found, torch.Tensor) and found.numel() == 1 and found.dtype.is_floating_point:
        return found if found.ndim == 0 or found is not output else None
    return None


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__}"


# -- what holds while the model is traced ------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_python(training: bool) -> Iterator[None]:
    """What PyTorch does in Python behind the graph's back: activation checkpoints run their function as it is, and in
    training CustomBackward is raised by gradient hooks, by calls of autograd, and by a custom autograd.Function, unless
    its backward is that of its forward's ops. Compiled functions run as they were written."""
    import torch.utils.checkpoint as checkpoints

    def run(_cls: type, function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)

    def nothing(*_args: Any, **_kwargs: Any) -> Iterator[None]:
        yield

    own_apply: Any = vars(torch.autograd.Function)["apply"]
    plain: dict[type, bool] = {}

    def check(cls: type, *args: Any, **kwargs: Any) -> Any:
        apply = own_apply.__get__(None, cls)
        if cls.__module__ == "torch._library.autograd":  # of a registered op, which stays in the graph as it is
            return apply(*args, **kwargs)
        if cls not in plain:
            plain[cls] = not kwargs and is_plain(cls, apply, args)
        if not plain[cls]:
            raise CustomBackward(f"{cls.__name__}.backward is not what autograd derives from its forward")
        return apply(*args)

    tracer = threading.get_ident()

    def refused(owner: Any, attribute: str, what: str) -> tuple[Any, str, Any]:
        own = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == tracer:
                raise CustomBackward(what)
            return own(*args, **kwargs)

        return owner, attribute, call

    changes: list[tuple[Any, str, Any]] = [
        (checkpoints.CheckpointFunction, "apply", classmethod(run)),
        (checkpoints, "_checkpoint_without_reentrant_generator", nothing),
    ]
    if training:
        changes += [
            (torch.autograd.Function, "apply", classmethod(check)),
            refused(torch.Tensor, "register_hook", "a hook on a gradient"),
            refused(torch.autograd, "grad", "torch.autograd.grad within the forward"),
            refused(torch.autograd, "backward", "backward within the forward"),
        ]
    with contextlib.ExitStack() as undo:
        for owner, attribute, made in changes:
            before = vars(owner).get(attribute)
            setattr(owner, attribute, made)
            if before is None:
                undo.callback(delattr, owner, attribute)
            else:
                undo.callback(setattr, owner, attribute, before)
        yield


@contextlib.contextmanager
def flat_regions() -> Iterator[None]:
    """Export keeps the switches of no_grad and autocast as they were called, instead of putting what is between them
    into submodules: that step forgets a no_grad inside an autocast region."""
    from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass

    def keep(module: fx.GraphModule, signature: Any) -> tuple[fx.GraphModule, Any]:
        return module, signature

    with contextlib.ExitStack() as undo:
        for owner in (replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass):
            attribute = owner.__name__.rpartition(".")[2]
            if hasattr(owner, attribute):
                undo.callback(setattr, owner, attribute, getattr(owner, attribute))
                setattr(owner, attribute, keep)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PyTorch's tracer logs what it also raises; the exception is enough."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# -- capture -----------------------------------------------------------------------------------------------------------


def capture(wrapper: Wrapper, inputs: tuple[Any, Any, Any], fake_mode: Any, answers: Answers) -> Captured:
    """inputs: (args, kwargs, target) of fake tensors. answers: to questions about numbers. Raises NotTraceable or
    UsageError, and passes on what the model raises behind such a question."""
    try:
        with plain_python(wrapper.need_loss), quiet(), answers.given(), casts.as_ops(wrapper.packing.remarks):
            return _export(wrapper, inputs, fake_mode)
    except Exception as error:
        if answers.checked(error):
            raise
        usage = _find(error, UsageError, NotTraceable)
        if usage is not None:
            raise usage from None
        if depends_on_data(error) or _find(error, CustomBackward):
            raise explain(error, wrapper.model) from error
        first = error
    try:
        with plain_python(wrapper.need_loss), quiet(), answers.given(), casts.as_ops(wrapper.packing.remarks):
            made = _make_fx(wrapper, inputs, fake_mode)
    except Exception as error:
        if answers.checked(error):
            raise
        known = depends_on_data(error) or _find(error, CustomBackward)
        raise explain(error if known else first, wrapper.model) from error
    reason = f"{type(first).__name__}: {str(first).strip().splitlines()[0] if str(first).strip() else ''}"
    made.notes.append(f"WARNING: traced by make_fx because torch.export failed ({reason}); module names are lost")
    return made


def _export(wrapper: Wrapper, inputs: tuple[Any, Any, Any], fake_mode: Any) -> Captured:
    # The context makes export use the mode of our fakes instead of a second one.
    with tracing(TracingContext(fake_mode)), flat_regions():
        program = torch.export.export(wrapper, inputs, strict=False)
        vmaps.inline(program, fake_mode)
    leaves = 0
    kinds: dict[str, tuple[str, Any]] = {}
    for spec in program.graph_signature.input_specs:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            kinds[spec.arg.name] = ("input", leaves)
            leaves += 1
        elif kind in ("PARAMETER", "BUFFER"):
            kinds[spec.arg.name] = ("param" if kind == "PARAMETER" else "buffer", spec.target)
        elif kind == "CONSTANT_TENSOR":
            assert spec.target is not None
            kinds[spec.arg.name] = ("constant", program.constants[spec.target])
        else:
            kinds[spec.arg.name] = ("object", spec.target)
    return Captured(program.graph_module, kinds, wrapper, fake_mode, "export")


def _make_fx(wrapper: Wrapper, inputs: tuple[Any, Any, Any], fake_mode: Any) -> Captured:
    """Pre-dispatch `make_fx` over the same fake weights and inputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    state = dict(wrapper.named_parameters()) | dict(wrapper.named_buffers())
    leaves, spec = pytree.tree_flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def call(state: dict[str, torch.Tensor], tensors: list[torch.Tensor]) -> tuple[Any, ...]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return torch.func.functional_call(wrapper, state, pytree.tree_unflatten(filled, spec))

    with fake_mode:
        module = make_fx(call, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(state, tensors)
    kinds: dict[str, tuple[str, Any]] = {}
    parameters = dict(wrapper.named_parameters())
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    labels = [("param" if name in parameters else "buffer", name) for name in state]
    labels += [("input", position) for position in positions]
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, label in zip(placeholders, labels, strict=True):
        kinds[node.name] = label
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if isinstance(value, fx.GraphModule):
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the graph would hold a {type(value).__name__}")
        with module.graph.inserting_before(placeholders[0]):
            made = module.graph.placeholder(f"c_{node.name}")
        made.meta["val"] = fake_like(fake_mode, value)
        kinds[made.name] = ("constant", value)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    return Captured(module, kinds, wrapper, fake_mode, "make_fx")


# -- errors ------------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _find(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    return next((e for e in _chain(error) if isinstance(e, kinds)), None)


def depends_on_data(error: BaseException) -> bool:
    """Whether tracing failed because Python needed to know the numbers in a tensor."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (DataDependent, GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    return any(isinstance(e, kinds) or "data-dependent" in str(e).lower() for e in _chain(error))


def explain(error: BaseException, model: nn.Module) -> NotTraceable:
    """The error for the user: the statement that could not be traced, and the module to make a leaf: the innermost one
    that was called, since another method of a module inside it (`self.part.to(...)`) runs in the caller's forward."""
    names = {id(module): name for name, module in model.named_modules()}
    place, text, path = "", "", None
    for link in _chain(error):
        for frame, line in reversed(list(traceback.walk_tb(_tb(link)))):
            if not place and not _is_library(frame.f_code.co_filename):
                place = f"{frame.f_code.co_filename}:{line}"
                text = _source_line(frame.f_code.co_filename, line)
            owner = frame.f_locals.get("self")
            if path is None and frame.f_code.co_name in ("forward", "_call_impl") and id(owner) in names:
                path = names[id(owner)]
        if place:
            break
    where = f"{path or 'the model'} "
    message = next(iter(str(error).strip().splitlines()), "")
    what = "cannot be traced"
    if depends_on_data(error):
        what = "depends on the numbers in a tensor"
    elif _find(error, CustomBackward):
        what = "has a backward of its own"
    details = [f"{place}: {text}"] if place else []
    details.append(f"{type(error).__name__}: {message}")
    found = NotTraceable(where + what, details, way_out(path))
    found.module = path
    return found


def _tb(error: BaseException) -> TracebackType | None:
    return error.__traceback__


def _is_library(file: str) -> bool:
    from pathlib import Path

    here = Path(__file__)
    roots = [str(path.parent) for path in (Path(torch.__file__), here, here.resolve())]
    return file.startswith(("<", *roots)) or file == contextlib.__file__


def _source_line(file: str, line: int) -> str:
    import linecache

    return linecache.getline(file, line).strip()
