"""Seconds of an op, measured on a device of this machine: forward, and backward as autograd runs it."""

from __future__ import annotations

import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardplan.planner.costs.allocations import scratch
from shardplan.planner.costs.company import Company, company, measure_company
from shardplan.planner.costs.roofline import is_view
from shardplan.planner.costs.store import Sample
from shardplan.planner.leaf_op import Leaf
from shardplan.planner.rules import views
from shardplan.planner.rules.localize import LocalCall, Slot

log = logging.getLogger(__name__)

aten = torch.ops.aten

VERSION = 7
"""Of the way of measuring: older measurements are not looked at."""

_LEAST_REPEATS, _MOST_REPEATS = 5, 9
_ENOUGH_SECONDS = 0.01
_INNER_SECONDS = 200e-6
_INNER_MOST = 20
_LONG_SECONDS = 0.1
_RING_NBYTES, _RING_COPIES = 32 << 20, 16
_ROUND_SECONDS = 0.03
_PARAMETERS = 8
_RANDOM_NUMBERS = 1 << 20
_CLASSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}
_LOOKS = views.RESHAPES | views.PERMUTES
_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def device_key(device: torch.device) -> str:
    """What measurements on a device depend on, the op aside."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}/{rank_threads()}"
    return f"{name}/torch-{torch.__version__}/{VERSION}"


def rank_threads() -> int:
    """Threads that a rank on the CPU computes with."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return max(int(text), 1) if text.isdecimal() else 1


@contextmanager
def as_a_rank() -> Iterator[None]:
    """Measure on the CPU as a rank will run."""
    before = torch.get_num_threads()
    if before == rank_threads():
        yield
        return
    torch.set_num_threads(rank_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine()


def call_key(call: LocalCall) -> str:
    """Everything that the time of a call depends on, the device aside."""
    tensors = ",".join(f"{_short(v.dtype)}{list(v.shape)}{'g' if v.needs_grad else ''}" for v in call.inputs)
    return f"{call.target}|{tensors}|{_plain(call.args)}|{_plain(sorted(call.kwargs.items()))}"


def timed_key(call: LocalCall) -> str:
    """The same without shapes where those do not matter: a call that only looks at its operand otherwise, forward and
    backward."""
    return family_key(call) if call.target in _LOOKS and is_view(call.target) else call_key(call)


def family_key(call: LocalCall) -> str:
    """Op, dtypes and which arguments need gradients: calls whose times lie on one curve."""
    tensors = ",".join(f"{_short(v.dtype)}{'g' if v.needs_grad else ''}" for v in call.inputs)
    return f"{call.target}|{tensors}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> str:
    if isinstance(value, Slot):
        return f"#{value.index}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_plain, value)) + "]"
    return str(value)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a call takes. scratch: bytes that it needs while it runs, besides operands, results and what it keeps."""

    forward_seconds: float
    backward_seconds: float
    forward_scratch: int = 0
    backward_scratch: int = 0


@dataclass(frozen=True, slots=True)
class _Readings:
    """Seconds forward alone, forward after other ops (the same unless wanted), backward alone; bytes of scratch."""

    alone: float
    after: float
    back: float = 0.0
    scratch: tuple[int, int] = (0, 0)


def measure(call: LocalCall, device: torch.device, among: Company | None = None) -> Taken | None:
    """What a call takes forward and backward, or None where it cannot be run by itself. among: what other ops do on
    the device (`measure_device`); None takes the call alone."""
    found = _attempt(call, device, among is not None)
    if found is None or among is None:
        return Taken(found.alone, found.back, *found.scratch) if found is not None else None
    forward, backward = found.alone, found.back
    if max(found.alone, found.after) <= _INNER_SECONDS:
        forward += among.forward * max(found.after - found.alone, 0.0)
        backward *= among.backward
    elif backward < _INNER_SECONDS:
        backward *= among.backward
    return Taken(forward, backward, *found.scratch)


def sample_of(taken: Taken, key: str, family: str, modelled: tuple[float, float]) -> Sample:
    """For the store. modelled: seconds forward and backward, as the roofline has them."""
    seconds = taken.forward_seconds, taken.backward_seconds
    return Sample(key, family, *seconds, *modelled, taken.forward_scratch, taken.backward_scratch)


def _attempt(call: LocalCall, device: torch.device, twice: bool) -> _Readings | None:
    try:
        with as_a_rank():
            return _measure(call, device, twice and device.type == "cpu")
    except Exception as error:  # the caller models it instead, and says so in the coverage
        log.debug("%s cannot be measured: %s", call.target, error)
        return None


def measure_device(device: torch.device) -> Company:
    """What ops in company take longer on a device. A GPU runs behind Python: its kernels take what they take alone."""
    with as_a_rank():
        start = _call_overhead(device)
        if device.type != "cpu":
            return Company(pass_seconds=start)

        def op(call: LocalCall) -> tuple[float, float, float] | None:
            found = _attempt(call, device, True)
            return (found.alone, found.after, found.back) if found is not None else None

        return measure_company(op, lambda action: _reading(action, device, 1), start)


def _as_composed(call: LocalCall) -> AbstractContextManager[Any]:
    """Attention with dropout is run without a fused kernel, which draws by its own tiles (see `rewrite.random_ops`)."""
    dropout = call.args[4] if len(call.args) > 4 else call.kwargs.get("dropout_p", 0.0)
    if call.target is aten.scaled_dot_product_attention.default and dropout:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _measure(call: LocalCall, device: torch.device, twice: bool) -> _Readings:
    """twice: whether forward is taken after other ops, too.

    Operands go round a ring of copies, and results stay for a round: in a step a weight is read once and a result is
    written to memory that was used long ago, so a loop over one set of operands in the nearest cache says too little.
    """
    ring = _ring(_tensors(call, device), sum(value.nbytes for value in call.outputs), device)
    turn = count()
    held: list[Any] = [None] * len(ring)
    filled = [(_filled(call.args, inputs), {k: _filled(v, inputs) for k, v in call.kwargs.items()}) for inputs in ring]

    def run() -> None:
        place = next(turn) % len(ring)
        args, kwargs = filled[place]
        held[place] = None  # its memory is the next result's
        with _as_composed(call):
            held[place] = call.target(*args, **kwargs)

    grads = [[tensor for tensor in inputs if tensor.requires_grad] for inputs in ring]
    with torch.set_grad_enabled(bool(grads[0])):
        first: list[float] = []
        needed = scratch(lambda: first.append(_reading(run, device, 1)), device)
        forward = _timed(run, device, first[0])
        after = _timed(run, device, forward, company(False)) if twice and forward < _INNER_SECONDS else forward
        if not grads[0]:
            return _Readings(forward, after, 0.0, (needed, 0))
        # Long ops read so much themselves that a shorter round is as cold.
        round_ = max(min(len(ring), int(_ROUND_SECONDS / max(forward, 1e-9))), 1)
        for place in (i for i in range(round_) if held[i] is None):
            turn = count(place)
            run()
        turn = count()
        results = [[r for r in _flat(result) if r.requires_grad] for result in held[:round_]]
        if not results[0]:
            return _Readings(forward, after, 0.0, (needed, 0))
        seeds = [torch.ones_like(r) for r in results[0]]
        made: list[Any] = [None] * round_

        def back() -> None:
            place = next(turn) % round_
            made[place] = None
            made[place] = torch.autograd.grad(results[place], grads[place], seeds, retain_graph=True, allow_unused=True)

        first.clear()
        behind = scratch(lambda: first.append(_reading(back, device, 1)), device)
        seconds = _timed(back, device, first[0])
        # A step calls autograd once, not once an op.
        back_seconds = max(seconds - _call_overhead(device), 0.1 * seconds)
        return _Readings(forward, after, back_seconds, (needed, behind))


def _ring(inputs: list[torch.Tensor], result_nbytes: int, device: torch.device) -> list[list[torch.Tensor]]:
    """The operands and copies of them: as many as there is room for with their results, one for large ones (a result
    that is kept makes the allocator fetch new pages, which a step does not)."""
    nbytes = result_nbytes + sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    copies = 1 if device.type != "cpu" else max(min(_RING_NBYTES // max(nbytes, 1), _RING_COPIES), 1)
    made = [inputs]
    for _ in range(copies - 1):
        made.append([tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs])
    return made


@lru_cache(maxsize=16)
def _call_overhead(device: torch.device) -> float:
    """Seconds of starting autograd, less those of one node."""
    leaf = torch.ones(1, device=device, requires_grad=True)
    short, long = leaf.view_as(leaf), leaf.view_as(leaf)
    for _ in range(10):
        long = long.view_as(leaf)
    seed = torch.ones(1, device=device)
    one = _timed(lambda: torch.autograd.grad(short, leaf, seed, retain_graph=True), device)
    eleven = _timed(lambda: torch.autograd.grad(long, leaf, seed, retain_graph=True), device)
    return max(one - (eleven - one) / 10, 0.0)


def _tensors(call: LocalCall, device: torch.device) -> list[torch.Tensor]:
    """Random operands; integers are valid indices into every floating operand of the call."""
    high = _index_limit(call)
    found = []
    for i, value in enumerate(call.inputs):
        known = call.target.ranges[i] if isinstance(call.target, Leaf) else None
        if known is not None:
            found.append(torch.randint(known[0], known[1] + 1, value.shape, device=device).to(value.dtype))
        elif value.dtype in _FLOATS:
            found.append(_random(value.shape, value.dtype, device).requires_grad_(value.needs_grad))
        elif value.dtype == torch.bool:
            found.append(torch.ones(value.shape, dtype=torch.bool, device=device))
        else:
            found.append(torch.randint(0, high, value.shape, device=device).to(value.dtype))
    return found


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers, which repeat in large tensors: to draw them would take longer than to run an op on them."""
    size = math.prod(shape)
    few = torch.randn(min(size, _RANDOM_NUMBERS), device=device).to(dtype)
    return (few if few.numel() == size else few.repeat(-(-size // few.numel()))[:size]).view(shape)


def _index_limit(call: LocalCall) -> int:
    """Integer operands below this are valid: they index rows, classes, or any dim of the floating operands."""
    first = call.inputs[0].shape if call.inputs else ()
    if call.target is aten.embedding.default and first:
        return max(first[0], 1)
    if call.target in _CLASSES and first:
        return max(first[min(1, len(first) - 1)], 1)
    return max(min((e for v in call.inputs if v.dtype in _FLOATS for e in v.shape), default=2), 1)


def _filled(value: Any, inputs: list[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return inputs[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, inputs) for item in value)
    if isinstance(value, torch.device):
        return inputs[0].device if inputs else value
    return value


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for part in value for item in _flat(part)] if isinstance(value, (list, tuple)) else []


def _timed(
    action: Callable[[], Any],
    device: torch.device,
    first: float | None = None,
    after: Callable[[], None] | None = None,
) -> float:
    """Median seconds of an action, after a warm-up. first: seconds that it took when it ran before, None where it did
    not. after: run before every reading. Without it, several per reading where one is too short for the clock."""
    once = _reading(action, device, 1) if first is None else first
    if once > _LONG_SECONDS:
        return once  # it varies little, and every further run would take the budget from other ops
    once = min(once, _reading(action, device, 1))
    inner = 1 if once > _INNER_SECONDS or after else min(int(_INNER_SECONDS / max(once, 1e-7)) + 1, _INNER_MOST)
    readings: list[float] = []
    while len(readings) < _LEAST_REPEATS or (sum(readings) * inner < _ENOUGH_SECONDS and len(readings) < _MOST_REPEATS):
        if after is not None:
            after()
        readings.append(_reading(action, device, inner))
    return statistics.median(readings)


def _reading(action: Callable[[], Any], device: torch.device, inner: int) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            start.record()
            for _ in range(inner):
                action()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / inner
    # One thread on its own: its CPU time, which other processes on the machine lengthen less than wall time.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(inner):
        action()
    return max((clock() - started - _clock_seconds(clock)) / inner, 0.0)


@lru_cache(maxsize=2)
def _clock_seconds(clock: Callable[[], float]) -> float:
    """Seconds of a call of a clock."""
    return statistics.median(-clock() + clock() for _ in range(100))


def measure_copy(nbytes: int, device: torch.device) -> float:
    """Seconds to read and write so many bytes once, as cold as operands are (see `_measure`)."""
    sources = [row[0] for row in _ring([torch.ones(max(nbytes // 4, 1), device=device)], nbytes, device)]
    made: list[torch.Tensor | None] = [None] * len(sources)
    turn = count()

    def copy() -> None:
        place = next(turn) % len(sources)
        made[place] = None
        made[place] = sources[place].clone()

    with as_a_rank():
        return _timed(copy, device)


def optimizer_key(factory: Callable[..., torch.optim.Optimizer]) -> str:
    """Everything that the seconds of an optimizer depend on, its parameters aside."""
    made = factory([torch.zeros(1).requires_grad_()])
    options = {name: value for name, value in made.defaults.items() if name != "lr"}
    return f"{type(made).__module__}.{type(made).__name__}{sorted(options.items())}"


def measure_optimizer(factory: Callable[..., torch.optim.Optimizer], nbytes: int, device: torch.device) -> float:
    """Seconds of an optimizer step on one of several fp32 parameters of so many bytes."""
    parameters = [torch.zeros(max(nbytes // 4, 1), device=device).requires_grad_() for _ in range(_PARAMETERS)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = factory(parameters)
    optimizer.step()
    with as_a_rank():
        return _timed(optimizer.step, device, None, company(True) if device.type == "cpu" else None) / _PARAMETERS
