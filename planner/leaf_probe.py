"""What is known of a leaf, by running it: its results, what it changes, what it costs, and how its batch may be split.

Every run has the real parameters where the model has them, else random ones, and the inputs that the example batch
gives it, else random ones of the same shapes. Nothing of the model is changed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from shardplan.planner.costs.base import OpSaves
from shardplan.planner.leaf_op import RUNNING, Leaf, LeafResult, plain
from shardplan.planner.trace import TensorInfo

_TRIALS = 4
_SINGLES = 8
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Unsuitable(Exception):
    """A module cannot be a leaf, or not be split; the text completes "router ..."."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run of a leaf showed.

    leaf: with the constants it returned; results: its tensors; returned: the pytree that they and the constants fill.
    changes: per held tensor, whether it is a buffer that the module changes. draws: whether it draws random numbers.
    saves: what autograd keeps of it.
    """

    leaf: Leaf
    results: tuple[LeafResult, ...]
    returned: pytree.TreeSpec
    changes: tuple[bool, ...]
    draws: bool
    saves: OpSaves


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """The generators of PyTorch, Python and numpy start from a seed and go on afterwards as if nothing had been drawn.
    One thread at a time: simulated ranks share the generators."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with RUNNING, torch.random.fork_rng(devices), plain_drawing(seed):
        torch.manual_seed(seed)
        yield


@contextmanager
def plain_drawing(seed: int) -> Iterator[None]:
    """As `drawing`, of the generators that are not PyTorch's."""
    numpy: Any = sys.modules.get("numpy")
    state, other = random.getstate(), numpy.random.get_state() if numpy else None
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(other)


def examine(leaf: Leaf, inputs: Sequence[torch.Tensor], held: Sequence[torch.Tensor], training: bool) -> Facts:
    """Run the leaf. inputs, held: real tensors. Raises Unsuitable, and whatever the module raises."""
    try:
        _run(leaf, inputs, held, False)
    except RuntimeError:
        leaf = replace(leaf, grad=True)  # if that does not help the next run says why
    first = _run(leaf, inputs, held, training, observed=True)
    if not first.tensors:
        raise Unsuitable("returns no tensor")
    if _own_backwards(first):
        leaf = _with_backward(leaf, inputs, held)
    checked = replace(
        leaf,
        constants=first.constants,
        ranges=tuple(map(_range, (*inputs, *held))),
        flops=first.flops,
        results=sum(t.numel() for t in first.tensors),
    )
    results = tuple(LeafResult(tuple(t.shape), t.dtype, t.requires_grad) for t in first.tensors)
    for index, (given, _) in enumerate(zip(first.given, inputs, strict=False)):
        if first.changed[index]:
            raise Unsuitable(f"changes its input {list(given.shape)} in place")
    changes = first.changed[len(inputs) :]
    for part, changed in zip(leaf.held, changes, strict=True):
        if changed and part.is_parameter:
            raise Unsuitable(f"changes its parameter {part.name} in forward")
    saves = _saves(first)
    return Facts(checked, results, first.returned, changes, first.drew, saves)


def _own_backwards(run: _Run) -> bool:
    """Whether a custom autograd.Function stands between the results of a run and what it was given."""
    waiting: list[Any] = [tensor.grad_fn for tensor in run.tensors]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _with_backward(leaf: Leaf, inputs: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> Leaf:
    """The leaf, `later` where its backward needs that. Raises whatever the backward raises even then."""
    later = replace(leaf, later=True)
    found = [_run(kind, inputs, held, True) for kind in (leaf, later)]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(t.shape, generator=generator).to(t) if t.requires_grad else None for t in found[1].tensors]
    wanted, _ = _gradients(found[1], seeds)
    try:
        plain, _ = _gradients(found[0], seeds)
    except Exception:
        return later
    pairs = [(p, w) for p, w in zip(plain, wanted, strict=True) if w is not None]
    return leaf if all(p is not None and _close(p, w) for p, w in pairs) else later


def _range(tensor: torch.Tensor) -> tuple[int, int] | None:
    if _floating(tensor) or not tensor.numel():
        return None
    return int(tensor.min()), int(tensor.max())


def check_shapes(facts: Facts, inputs: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> None:
    """Raises Unsuitable where shapes of results, or plain values beside them, depend on the numbers in the inputs."""
    for seed in range(1, _TRIALS):
        try:
            again = _run(facts.leaf, redrawn(inputs, seed), held, False)
        except Exception:  # not all inputs that can be drawn make sense
            continue
        shapes = [tuple(t.shape) for t in again.tensors]
        if shapes != [result.shape for result in facts.results]:
            raise Unsuitable(f"returns results whose shapes depend on the numbers in its input: {shapes}")
        if again.constants != facts.leaf.constants:
            raise Unsuitable("returns plain values that depend on the numbers in its input")


# -- inputs ------------------------------------------------------------------------------------------------------------


def redrawn(inputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Inputs of the same shapes: random floats of the same spread; the rows of everything else in another order."""
    generator = torch.Generator().manual_seed(seed)
    rows = {tensor.shape[0] for tensor in inputs if tensor.ndim}
    orders = {count: torch.randperm(count, generator=generator) for count in sorted(rows)}
    found = []
    for tensor in inputs:
        if tensor.dtype.is_floating_point and tensor.numel() > 1:
            wide = tensor.detach().float()
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            found.append((wide.mean() + noise * wide.std().clamp(min=1e-3)).to(tensor.dtype))
        elif tensor.ndim and not tensor.dtype.is_floating_point:
            found.append(tensor[orders[tensor.shape[0]].to(tensor.device)])
        else:
            found.append(tensor)
    return found


def made_up(infos: Sequence[TensorInfo], run: Callable[[list[torch.Tensor]], Any]) -> list[torch.Tensor]:
    """Random tensors with which `run` does not fail: integers below an extent of any of them, or below 2."""
    limits = sorted({extent for i in infos for extent in i.shape if extent > 2}, reverse=True)
    failure: Exception | None = None
    for limit in [*limits, 2, 1]:
        found = [random_tensor(info, limit, seed) for seed, info in enumerate(infos)]
        try:
            run(found)
            return found
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def random_tensor(info: TensorInfo, limit: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if info.dtype.is_floating_point or info.dtype.is_complex:
        spread = info.shape[-1] ** -0.5 if info.needs_grad and len(info.shape) > 1 else 1.0
        return (torch.randn(info.shape, generator=generator) * spread).to(info.dtype)
    high = 2 if info.dtype == torch.bool else max(limit, 1)
    return torch.randint(0, high, info.shape, generator=generator).to(info.dtype)


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """given: the tensors that the leaf was called with; kept: what autograd kept."""

    given: list[torch.Tensor]
    tensors: list[torch.Tensor]
    constants: tuple[tuple[Any] | None, ...]
    returned: pytree.TreeSpec
    changed: tuple[bool, ...]
    drew: bool
    kept: list[torch.Tensor]
    flops: float = 0.0


def _run(
    leaf: Leaf,
    inputs: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    training: bool,
    observed: bool = False,
) -> _Run:
    given = [_fresh(t, training and _floating(t)) for t in inputs]
    given += [_fresh(t, training and t.requires_grad) for t in held]
    before = [t.detach().clone() for t in given] if observed else []
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    counter = _Counter()
    with drawing(0), torch.set_grad_enabled(training):
        states = _states()
        if observed:
            with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                returned = leaf.call(*given)
        else:
            returned = leaf.call(*given)
        drew = states != _states()
    flat, spec = pytree.tree_flatten(returned)
    return _Run(
        given,
        [t for t in flat if isinstance(t, torch.Tensor)],
        tuple(None if isinstance(t, torch.Tensor) else (plain(t),) for t in flat),
        spec,
        tuple(not _same(now, then) for now, then in zip(given, before, strict=True)) if observed else (),
        drew,
        kept,
        counter.flops,
    )


class _Counter(TorchDispatchMode):
    """Adds up the arithmetic of the ops that run, by PyTorch's formulas. (`FlopCounterMode` puts hooks into modules,
    which do not bear it when these call autograd themselves.)"""

    flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += float(formula(*args, **(kwargs or {}), out_val=made))
        return made


def _states() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    found: list[Any] = [torch.default_generator.get_state().numpy().tobytes(), random.getstate()]
    if torch.cuda.is_initialized():
        found += [torch.cuda.get_rng_state(i).numpy().tobytes() for i in range(torch.cuda.device_count())]
    if numpy:
        state = numpy.random.get_state()
        found.append((state[1].tobytes(), state[2:]))
    return tuple(found)


def _fresh(tensor: torch.Tensor, grad: bool) -> torch.Tensor:
    """A copy that may be written to; with grad, one that autograd has made."""
    made = tensor.detach().clone()
    return made.requires_grad_().clone() if grad else made


def _floating(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _same(now: torch.Tensor, then: torch.Tensor) -> bool:
    with torch.no_grad():
        return now.shape == then.shape and bool(torch.equal(now.nan_to_num(), then.nan_to_num()))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _saves(run: _Run) -> OpSaves:
    memories = {_memory(t): t.untyped_storage().nbytes() for t in run.kept}
    ins, outs = [_memory(t) for t in run.given], [_memory(t) for t in run.tensors]
    extra = sum(nbytes for key, nbytes in memories.items() if key not in ins and key not in outs)
    whole = sum(t.numel() * t.element_size() for t in run.tensors)
    return OpSaves(
        tuple(key in memories for key in ins),
        tuple(key in memories and key not in ins for key in outs),
        extra / whole if whole else 0.0,
    )


# -- splitting the batch -----------------------------------------------------------------------------------------------


def prove_split(
    facts: Facts,
    samples: Sequence[Sequence[torch.Tensor]],
    held: Sequence[torch.Tensor],
    dims: Sequence[int | None],
    batch: int,
    training: bool,
) -> tuple[tuple[int | str, ...], bool]:
    """Run the leaf on parts of the batch and on the whole, and on single samples and on some together, forward and
    backward.

    samples: inputs to try; dims: per input, the dim that carries the batch; batch: its size. -> per result, the dim
    along which the parts are put together, or "sum"; and whether every parameter always got a gradient. Raises
    Unsuitable with the reason where parts do not give the whole. What random inputs do not show it cannot find; single
    samples show most of what mixes samples.
    """
    if facts.draws:
        raise Unsuitable("draws random numbers")
    if any(facts.changes):
        raise Unsuitable("changes its buffers")
    parts = next(n for n in range(2, batch + 1) if batch % n == 0)
    few = min(batch, _SINGLES)
    found: tuple[int | str, ...] | None = None
    tried, steady = 0, True
    failure = ""
    for sample in samples:
        try:
            kinds, all_used = _compare(facts, sample, held, dims, parts, training)
            steady = steady and all_used
            some = [t if d is None else t.narrow(d, 0, t.shape[d] // batch * few) for t, d in zip(sample, dims)]
            if few != parts and _compare(facts, some, held, dims, few, training)[0] != kinds:
                raise Unsuitable("puts its parts together in different ways")
        except Unsuitable:
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if found is not None and kinds != found:
            raise Unsuitable("puts its parts together in different ways")
        found, tried = kinds, tried + 1
    if found is None or tried < min(2, len(samples)):
        raise Unsuitable(f"cannot be run on a part of the batch ({failure})")
    return found, steady


def _compare(
    facts: Facts,
    sample: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    dims: Sequence[int | None],
    parts: int,
    training: bool,
) -> tuple[tuple[int | str, ...], bool]:
    whole = _run(facts.leaf, sample, held, training)
    pieces = [
        _run(
            facts.leaf,
            [t if d is None else t.chunk(parts, d)[i] for t, d in zip(sample, dims, strict=True)],
            held,
            training,
        )
        for i in range(parts)
    ]
    if any(piece.constants != whole.constants for piece in pieces):
        raise Unsuitable("returns other plain values for a part of the batch")
    kinds = tuple(
        _together([piece.tensors[i] for piece in pieces], result, parts) for i, result in enumerate(whole.tensors)
    )
    return kinds, not training or _compare_gradients(whole, pieces, dims, kinds, parts)


def _together(pieces: list[torch.Tensor], whole: torch.Tensor, parts: int) -> int | str:
    """How the parts' results make up the whole one."""
    for dim in range(whole.ndim):
        if all(
            piece.shape[dim] * parts == whole.shape[dim] and piece.ndim == whole.ndim for piece in pieces
        ) and _close(torch.cat(pieces, dim), whole):
            return dim
    alike = _floating(whole) and all(piece.shape == whole.shape for piece in pieces)
    if alike and _close(torch.stack(pieces).sum(0), whole):
        return "sum"
    raise Unsuitable("gives other results for parts of the batch")


def _compare_gradients(
    whole: _Run, pieces: list[_Run], dims: Sequence[int | None], kinds: tuple[int | str, ...], parts: int
) -> bool:
    """Whether every parameter got a gradient of the whole."""
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(t.shape, generator=generator).to(t) if t.requires_grad else None for t in whole.tensors]
    wanted, steady = _gradients(whole, seeds)
    found = []
    for number, piece in enumerate(pieces):
        own = [
            None if s is None else s if kind == "sum" else s.chunk(parts, int(kind))[number]
            for s, kind in zip(seeds, kinds, strict=True)
        ]
        found.append(_gradients(piece, own)[0])
    dims = [*dims, *[None] * (len(wanted) - len(dims))]
    for index, (gradient, dim) in enumerate(zip(wanted, dims, strict=True)):
        given = [part[index] for part in found]
        if gradient is None:
            continue
        joined = torch.cat(given, dim) if dim is not None else torch.stack(given).sum(0)  # type: ignore[arg-type]
        if not _close(joined, gradient):
            raise Unsuitable("gives other gradients for parts of the batch")
    return steady


def _gradients(run: _Run, seeds: list[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], bool]:
    """Gradient of every tensor given to the run (zeros where none arrives, None where none can), and whether every
    tensor that wants one got one."""
    outs = [(t, s) for t, s in zip(run.tensors, seeds, strict=True) if t.requires_grad and s is not None]
    ins = [t for t in run.given if t.requires_grad]
    given: Sequence[torch.Tensor | None] = [None] * len(ins)
    if outs and ins:
        given = torch.autograd.grad([t for t, _ in outs], ins, [s for _, s in outs], allow_unused=True)
    made = iter(torch.zeros_like(t) if g is None else g for t, g in zip(ins, given, strict=True))
    return [next(made) if t.requires_grad else None for t in run.given], all(g is not None for g in given)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the largest entry."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not _floating(wanted):
        return bool(torch.equal(found, wanted))
    if not wanted.numel():
        return True
    scale = wanted.detach().abs().max().clamp(min=1e-6)
    return bool((found - wanted).detach().abs().max() <= _TOLERANCE.get(wanted.dtype, 1e-4) * scale)
