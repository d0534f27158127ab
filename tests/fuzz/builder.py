"""Draw a program: every statement comes from a few bytes, is tried out on real numbers, and dropped if it does not run.

So a list of byte strings is a program, any list is a legal one, and shorter or smaller ones give simpler programs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.program import Program

LARGEST = 1e4
MOST_ENTRIES = 3000
MOST_DIMS = 5
EXTENTS = (4, 2, 3, 6, 8, 1, 5)


class Skip(Exception):
    """The statement has no meaning here."""


class Draws:
    """Choices read from bytes; zeros once they have run out."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def below(self, count: int) -> int:
        """A number in [0, count)."""
        if count < 1:
            raise Skip
        byte = self.data[self.position] if self.position < len(self.data) else 0
        self.position += 1
        return byte % count

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def chance(self, one_in: int) -> bool:
        """True in one case of `one_in`, never for zero bytes."""
        return self.below(one_in) == one_in - 1


@dataclass(frozen=True, slots=True)
class Value:
    """A variable of the program: its name, shape, and kind ("float", "int", "bool")."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return self.name


class Builder:
    """A program being drawn. `namespace` holds the numbers that every variable has on the example batch."""

    def __init__(self, header: Draws) -> None:
        self.draws = header
        self.batch_size = header.one((4, 8, 6, 2))
        dtype = header.one(("float64",) * 8 + ("float32", "bfloat16"))
        self.program = Program(dtype)
        self.module = nn.Module()
        self.values: list[Value] = []
        self.params: list[Value] = []
        self.tables: list[Value] = []
        self.namespace: dict[str, Any] = {
            "torch": torch, "F": F, "nn": nn, "self": self.module, "D": getattr(torch, dtype)
        }  # fmt: skip
        self.count = 0

    # -- reading ---------------------------------------------------------------------------------------------------

    def pick(self, fits: Callable[[Value], bool] = lambda v: True, kind: str = "float") -> Value:
        """One of the latest variables that fit. Raises Skip where there is none."""
        found = [v for v in reversed(self.values) if v.kind == kind and fits(v)]
        return found[self.draws.below(min(len(found), 8))]

    def ranked(self, low: int, high: int = MOST_DIMS) -> Value:
        return self.pick(lambda v: low <= v.rank <= high)

    def dim(self, value: Value, signed: bool = True) -> int:
        """A dim of the variable, counted from the end as often as from the front."""
        if not value.rank:
            raise Skip
        dim = self.draws.below(value.rank)
        return dim - value.rank if signed and self.draws.chance(2) else dim

    def extent(self) -> int:
        return self.draws.one(EXTENTS)

    def param(self, shape: Sequence[int]) -> str:
        """A parameter of the shape: a new one, one that is there (reuse), now and then frozen."""
        shape = tuple(shape)
        same = [p for p in self.params if p.shape == shape]
        if same and self.draws.chance(3):
            return self.draws.one(same).name
        scale = "" if len(shape) < 2 else f" / {max(1, round(shape[-1] ** 0.5))}"
        frozen = ", requires_grad=False" if self.draws.chance(8) else ""
        name = f"p{len(self.params)}"
        self.attribute(name, f"nn.Parameter(torch.randn({list(shape)}, dtype=D){scale}{frozen})")
        self.params.append(Value(f"self.{name}", shape, "float"))
        return f"self.{name}"

    def attribute(self, name: str, expression: str) -> str:
        """Add ``self.name = expression`` to the model."""
        setattr(self.module, name, eval(expression, self.namespace))
        self.program.attributes.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def submodule(self, expression: str) -> str:
        """Add a module and give its name in the model."""
        self.count += 1
        return self.attribute(f"m{self.count}", expression)

    def buffer(self, expression: str) -> str:
        self.count += 1
        name = f"b{self.count}"
        self.module.register_buffer(name, eval(expression, self.namespace))
        self.program.attributes.append(f'self.register_buffer("{name}", {expression})')
        return f"self.{name}"

    # -- writing ---------------------------------------------------------------------------------------------------

    def new(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def add(self, expression: str, before: str = "") -> Value:
        """``name = expression`` as a new statement. before: "with torch.no_grad(): " or nothing."""
        name = self.new()
        self.run(f"{before}{name} = {expression}", (name,))
        return self.values[-1]

    def add_several(self, expression: str, count: int) -> list[Value]:
        """``a, b = expression``."""
        names = tuple(self.new() for _ in range(count))
        self.run(f"{', '.join(names)}, = {expression}", names)
        return self.values[-count:]

    def run(self, line: str, made: Sequence[str] = ()) -> None:
        """Append a statement that sets the names `made`. Raises Skip where it fails or its numbers are of no use."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                exec(line, self.namespace)
            except Exception as error:
                raise Skip from error
        found = []
        for name in made:
            tensor = self.namespace[name]
            if not isinstance(tensor, torch.Tensor) or not _usable(tensor):
                raise Skip
            found.append(Value(name, tuple(tensor.shape), kind_of(tensor)))
        self.program.body.append(line)
        self.values += found

    def tensor(self, value: Value) -> torch.Tensor:
        return self.namespace[value.name]


def kind_of(tensor: torch.Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    if tensor.dtype.is_complex:
        return "complex"
    return "float" if tensor.dtype.is_floating_point else "int"


def _usable(tensor: torch.Tensor) -> bool:
    if tensor.numel() > MOST_ENTRIES or tensor.ndim > MOST_DIMS or tensor.numel() == 0:
        return False
    values = tensor.detach()
    values = values.abs() if values.dtype != torch.bool else values
    return bool((values.double() < LARGEST).all())
