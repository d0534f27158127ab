"""Record how tensors get their values, without computing them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shardplan.errors import UsageError
from shardplan.runtime.tape import Here, Recipe, Step, Tape, View

_META = torch.device("meta")
_ALLOCATE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted"}
# In-place operations that do not look at what they overwrite.
_OVERWRITE = {
    "bernoulli_",
    "cauchy_",
    "copy_",
    "exponential_",
    "fill_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
    "zero_",
}


class Recorder(TorchDispatchMode):
    """Runs operations on the meta device and writes them on a tape; numbers that Python asks for are computed.

    Tensors that exist for real (made of Python numbers, read from files) stay real. protected: real tensors that keep
    their values, whatever is done to them. aside: nothing is recorded now.
    """

    def __init__(self, seed: int, protected: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.aside = False
        self.protected = {tensor.untyped_storage()._cdata for tensor in protected}
        self.tape = Tape(seed)
        self._numbers: dict[int, int] = {}
        self._kept: list[torch.UntypedStorage] = []  # so that their addresses stay theirs
        self._written: dict[int, list[View] | None] = {}  # None: all of it

    # -- storages ------------------------------------------------------------------------------------------------------

    def adopt(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage, from now on recorded."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._kept)
            self._kept.append(storage)
            self.tape.nbytes[number] = storage.nbytes()
            self._written[number] = []
        elif storage.nbytes() > self.tape.nbytes[number]:
            self.tape.nbytes[number] = storage.nbytes()
            self._written[number] = []
        return number

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a recorded one."""
        return tensor.is_meta and tensor.untyped_storage()._cdata in self._numbers

    def view(self, tensor: torch.Tensor) -> View:
        number = self.adopt(tensor)
        return View(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def defined(self, view: View) -> bool:
        """Whether every element has been given a value."""
        written = self._written[view.storage]
        if written is None or 0 in view.shape:
            return True
        if not written:
            return False
        mask = torch.zeros(self.tape.nbytes[view.storage], dtype=torch.bool)
        for part in written:
            _bytes_of(mask, part).fill_(True)
        return bool(_bytes_of(mask, view).all())

    def recipe(self, tensor: torch.Tensor) -> Recipe | None:
        """How a recorded tensor is made; None where some of it was never given a value."""
        view = self.view(tensor)
        return self.tape.recipe(view) if self.defined(view) else None

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a recorded tensor as things stand, on the CPU."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return self.tape.recipe(self.view(tensor)).make()

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = _written_by(func, args, kwargs)
        if any(tensor.untyped_storage()._cdata in self.protected for tensor in written):
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        if self.aside or any(tensor.is_meta and not self.holds(tensor) for tensor in tensors):
            for tensor in written:
                if self.holds(tensor):
                    self._written[self.adopt(tensor)] = []
            return func(*args, **kwargs)
        if tensors and not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None or not func._schema.returns or not _returns_tensors(func):
            return self._really(func, args, kwargs)
        if any(not tensor.is_meta for tensor in written):
            return self._really(func, args, kwargs)
        try:
            return self._record(func, args, kwargs)
        except (NotImplementedError, RuntimeError) as error:
            # The shape of the result depends on numbers, or there is no meta kernel.
            return self._really(func, args, kwargs, error)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        names = {argument.name for argument in func._schema.arguments}
        on_meta = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        if "device" in names:
            on_meta["device"] = _META
        args, on_meta = pytree.tree_map_only(torch.Tensor, self._lifted, (args, on_meta))
        written = _written_by(func, args, on_meta)
        returned = func(*args, **on_meta)
        tensors = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        fresh = [(i, tensor) for i, tensor in enumerate(tensors) if not self.holds(tensor)]
        base = func._schema.name.partition("::")[2]
        if base in _ALLOCATE:
            for tensor in tensors:
                self.adopt(tensor)
            return returned
        if base == "set_" or not (fresh or written):
            return returned  # the tensors changed hands, no values did
        inputs = [leaf for leaf in pytree.tree_leaves((args, on_meta)) if isinstance(leaf, torch.Tensor)]
        if "dtype" in names and not inputs and on_meta.get("dtype") is None:
            on_meta["dtype"] = tensors[0].dtype
        overwrites = bool(written) and (base in _OVERWRITE or "out" in on_meta)
        if overwrites:
            for tensor in written:
                del inputs[next(i for i, other in enumerate(inputs) if other is tensor)]
        # Of a tensor that gives only its shape, no value is read.
        reads = [self.view(tensor) for tensor in inputs if not base.endswith("_like") and not base.startswith("new_")]
        known = all(self.defined(view) for view in reads)
        made = tuple((i, self.view(tensor)) for i, tensor in fresh)
        changed = [self.view(tensor) for tensor in written]
        self._add(func, args, on_meta, made, reads, changed, known, overwrites)
        return returned

    def _add(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        made: tuple[tuple[int, View], ...],
        reads: list[View],
        changed: list[View],
        known: bool,
        overwrites: bool,
    ) -> None:
        if func is not None:
            args, kwargs = pytree.tree_map(lambda leaf: _stored(self, leaf), (args, kwargs))
        whole = {view.storage for _, view in made}
        whole |= {view.storage for view in changed if overwrites and self._covers(view)}
        whole -= {view.storage for view in reads}
        step = Step(
            "literal" if func is None else str(func),
            tuple(args),
            kwargs,
            made,
            tuple(dict.fromkeys(view.storage for view in reads)),
            tuple(dict.fromkeys(view.storage for view in changed)),
            len(self.tape.steps),
            func is not None and torch.Tag.nondeterministic_seeded in func.tags,
        )
        self.tape.add(step, whole)
        for view in [*(view for _, view in made), *changed]:
            written = self._written[view.storage]
            if not known:
                self._written[view.storage] = []
            elif view.storage in whole or (overwrites and self._covers(view)):
                self._written[view.storage] = None
            elif written is not None and overwrites:
                written.append(view)

    def _covers(self, view: View) -> bool:
        count = 1
        for extent in view.shape:
            count *= extent
        return count * view.dtype.itemsize == self.tape.nbytes[view.storage]

    def _lifted(self, tensor: torch.Tensor) -> torch.Tensor:
        """A recorded tensor with the values of a real one."""
        if tensor.is_meta:
            return tensor
        literal = tensor.detach().clone().cpu()
        made = torch.empty_strided(literal.shape, literal.stride(), dtype=literal.dtype, device=_META)
        self._add(None, (literal,), {}, ((0, self.view(made)),), [], [], True, False)
        return made

    def _really(self, func: Any, args: Any, kwargs: dict[str, Any], reason: Exception | None = None) -> Any:
        """Compute now, of the values that recorded tensors have."""
        if any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
            raise reason or NotImplementedError(f"{func} of a tensor whose values are not there")
        real: dict[int, torch.Tensor] = {}

        def given(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_meta and id(tensor) not in real:
                if not self.defined(self.view(tensor)):
                    if reason is not None:
                        raise reason
                    raise UsageError(
                        f"{func} needs the values of a tensor that has none yet",
                        hints=["give the tensor values (nn.init) before they are used"],
                    )
                real[id(tensor)] = self.real(tensor)
            return real.get(id(tensor), tensor)

        overwriting = func._schema.name.partition("::")[2] in _OVERWRITE
        written = [tensor for tensor in _written_by(func, args, kwargs) if tensor.is_meta]
        if overwriting:
            real |= {id(t): torch.empty_like(t, device="cpu") for t in written}
        real_args, real_kwargs = pytree.tree_map_only(torch.Tensor, given, (args, kwargs))
        returned = func(*real_args, **real_kwargs)
        for tensor in written:
            self._record(torch.ops.aten.copy_.default, (tensor, real[id(tensor)]), {})
        back = {id(real[id(tensor)]): tensor for tensor in written}
        return pytree.tree_map_only(torch.Tensor, lambda t: back.get(id(t), t), returned)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Whatever is done to tensors in the block is recorded; to the code in it they look like tensors on the CPU."""
    with _Faces(recorder), recorder:
        yield


class _Faces(TorchFunctionMode):
    """Recorded tensors look like tensors on the CPU to the code that builds the model."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.answers: dict[Any, Any] = {
            torch.Tensor.device.__get__: torch.device("cpu"),  # pyright: ignore[reportAttributeAccessIssue]
            torch.Tensor.is_meta.__get__: False,  # pyright: ignore[reportAttributeAccessIssue]
            torch.Tensor.is_cpu.__get__: True,  # pyright: ignore[reportAttributeAccessIssue]
        }
        self.values = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__repr__}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.answers or func in self.values or func is torch.Tensor.__deepcopy__:
            tensor = args[0]
            with torch._C.DisableTorchFunction():
                held = self.recorder.holds(tensor)
            if held:
                if func in self.answers:
                    return self.answers[func]
                if func is torch.Tensor.__deepcopy__:
                    return _copied(tensor, args[1])
                return func(self.recorder.real(tensor.detach()), *args[1:], **kwargs)
        if self.recorder.aside or not any(_is_meta(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        # The caller names the meta device and means it. (Below Python, any device that is named is that of a recorded
        # tensor.)
        self.recorder.aside = True
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.aside = False


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _is_meta(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "meta") or (isinstance(value, str) and value == "meta")


def _stored(recorder: Recorder, leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        if leaf.is_conj() or leaf.is_neg():
            raise NotImplementedError("a conjugated view")
        return recorder.view(leaf)
    return Here() if isinstance(leaf, torch.device) else leaf


def _returns_tensors(func: Any) -> bool:
    return all("Tensor" in str(value.type) for value in func._schema.returns)


def _written_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments that the operation changes."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def _bytes_of(mask: torch.Tensor, view: View) -> torch.Tensor:
    size = view.dtype.itemsize
    strides = (*(stride * size for stride in view.stride), 1)
    return mask.as_strided((*view.shape, size), strides, view.offset * size)
