"""Ops in company: how much longer an op takes in a step than run over and over by itself.

An op that is timed alone finds its code and data in the caches; in a step it finds those of other ops there. So a short
op on the CPU is timed twice, alone and after a small layer of other ops, which is colder than it gets in a step. What
lies between is measured once per device on a block of layers that runs as the generated code of a stage does: alone +
`forward` * (after others - alone), and `backward` * alone, make up the time of the whole block. Starting autograd is
a term of its own (`pass_seconds`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from shardplan.planner.rules.localize import LocalCall, Slot
from shardplan.planner.trace import TensorInfo

aten = torch.ops.aten
_LAYERS = 3
_SIZE, _HEADS, _TOKENS, _ROWS = 32, 4, 8, 64
_ROUNDS = 15
_FORWARD_BOUNDS = (0.0, 1.0)
_BACKWARD_BOUNDS = (0.8, 1.25)
_MOST_PASS_SECONDS = 1e-3


@dataclass(frozen=True, slots=True)
class Company:
    """forward, backward: see the module docstring. pass_seconds: of starting a backward."""

    forward: float = 0.0
    backward: float = 1.0
    pass_seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Company | None:
        """Inverse of `to_json`; None where the text is damaged or absurd."""
        try:
            found = Company(**json.loads(text))
            sane = (
                _FORWARD_BOUNDS[0] <= found.forward <= _FORWARD_BOUNDS[1]
                and _BACKWARD_BOUNDS[0] <= found.backward <= _BACKWARD_BOUNDS[1]
                and 0 <= found.pass_seconds <= _MOST_PASS_SECONDS
            )
        except (ValueError, TypeError):
            return None
        return found if sane else None


Call = Callable[..., Any]


class _Layer:
    """Weights of a small attention and mlp layer, and its forward through whatever runs the ops."""

    def __init__(self) -> None:
        def weight(*shape: int) -> torch.Tensor:
            return (torch.arange(torch.Size(shape).numel()) % 7 * 0.01).reshape(shape).requires_grad_()

        self.norm, self.norm2 = weight(_SIZE), weight(_SIZE)
        self.mixed, self.out = weight(3 * _SIZE, _SIZE), weight(_SIZE, _SIZE)
        self.wide, self.narrow = weight(4 * _SIZE, _SIZE), weight(_SIZE, 4 * _SIZE)

    def run(self, do: Call, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        y = do(aten.linear.default, do(aten.layer_norm.default, x, [_SIZE], self.norm), self.mixed)
        heads = [
            do(aten.transpose.int, do(aten.reshape.default, part, [batch, _TOKENS, _HEADS, _SIZE // _HEADS]), 1, 2)
            for part in do(aten.chunk.default, y, 3, -1)
        ]
        attended = do(aten.scaled_dot_product_attention.default, *heads, None, 0.0, True)
        whole = do(aten.reshape.default, do(aten.transpose.int, attended, 1, 2), [batch, _TOKENS, _SIZE])
        x = do(aten.add.Tensor, x, do(aten.linear.default, whole, self.out))
        y = do(aten.linear.default, do(aten.layer_norm.default, x, [_SIZE], self.norm2), self.wide)
        return do(aten.add.Tensor, x, do(aten.linear.default, do(aten.gelu.default, y), self.narrow))

    def weights(self) -> list[torch.Tensor]:
        return [self.norm, self.norm2, self.mixed, self.out, self.wide, self.narrow]


class Block:
    """Layers on [4, 8, 32], with an embedding before and a mean behind them."""

    def __init__(self) -> None:
        self.table = torch.ones(_ROWS, _SIZE).requires_grad_()
        self.layers = [_Layer() for _ in range(_LAYERS)]
        self.ids = torch.arange(4 * _TOKENS).reshape(4, _TOKENS)

    def run(self, do: Call) -> torch.Tensor:
        x = do(aten.embedding.default, self.table, self.ids)
        for layer in self.layers:
            x = layer.run(do, x)
        return do(aten.mean.default, do(aten.pow.Tensor_Scalar, x, 2))

    def weights(self) -> list[torch.Tensor]:
        return [self.table, *(w for layer in self.layers for w in layer.weights())]

    def calls(self) -> list[LocalCall]:
        """Every op of the block, to be measured by itself."""
        found: list[LocalCall] = []

        def do(target: Any, *args: Any) -> Any:
            inputs: list[TensorInfo] = []

            def slot(value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return value
                inputs.append(_info(value))
                return Slot(len(inputs) - 1)

            slots = tuple(map(slot, args))
            result = target(*args)
            outputs = [_info(r) for r in (result if isinstance(result, (tuple, list)) else [result])]
            found.append(LocalCall(target, slots, {}, tuple(inputs), tuple(outputs)))
            return result

        self.run(do)
        return found


def _info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _do(target: Any, *args: Any) -> Any:
    return target(*args)


@lru_cache(maxsize=2)
def company(backward: bool) -> Callable[[], None]:
    """One layer of other ops, to be run between two readings of a short op: forward, or forward and backward."""
    layer = _Layer()
    x = torch.ones(4, _TOKENS, _SIZE).requires_grad_()

    def run() -> None:
        with torch.enable_grad():
            y = layer.run(_do, x).sum()
            if backward:
                torch.autograd.grad(y, layer.weights())

    return run


def measure_company(
    op: Callable[[LocalCall], tuple[float, float, float] | None],
    reading: Callable[[Callable[[], Any]], float],
    start_seconds: float,
) -> Company:
    """Run the block and its ops. op: seconds of a call forward alone, forward after others, backward alone. reading:
    seconds of an action. start_seconds: of starting autograd by itself, warm."""
    block = Block()
    kept: list[torch.Tensor] = []

    def forward() -> None:
        kept[:] = [block.run(_do)]

    def backward() -> None:
        torch.autograd.backward(kept[0])

    forwards, backwards = [], []
    with torch.enable_grad():
        for index in range(_ROUNDS + 3):
            for weight in block.weights():
                weight.grad = None
            pair = reading(forward), reading(backward)
            if index >= 3:
                forwards.append(pair[0])
                backwards.append(pair[1])
    known: dict[str, tuple[float, float, float]] = {}
    alone = after = back = 0.0
    for call in block.calls():
        key = f"{call.target}{call.inputs}{call.args}"
        if key not in known:
            measured = op(call)
            if measured is None:
                return Company(pass_seconds=start_seconds)
            known[key] = measured
        alone, after, back = (a + b for a, b in zip((alone, after, back), known[key], strict=True))
    whole, whole_back = statistics.median(forwards), statistics.median(backwards)
    ahead = (whole - alone) / (after - alone) if after > alone else 0.0
    behind = (whole_back - start_seconds) / back if back else 1.0
    return Company(_between(ahead, _FORWARD_BOUNDS), _between(behind, _BACKWARD_BOUNDS), start_seconds)


def _between(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
