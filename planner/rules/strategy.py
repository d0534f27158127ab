"""One way to run an op on one mesh axis."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from shardplan.planner.placement import Mesh, Placement, parse

_TEXT = re.compile(
    r"^(?P<name>[^:]*): (?P<ins>.*?) -> (?P<outs>[^\[*/]*)(?:\[(?P<impl>\w+)\])?(?P<scale> /n)?(?: \*(?P<groups>\d+))?$"
)


OWN, SENT = "own_experts", "sent_experts"
"""`Strategy.impl` of mixtures whose experts are split: a rank runs the pairs of its experts, or is sent them."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """Placements of an op's tensor arguments and results on one mesh axis.

    name: the dimension letter that is split ("b", "n", "k", "v"), "-" for replicated, "d" for its dual.
    inputs: one placement per `planner.trace.tensor_args`; outputs: one per tensor result (`planner.trace.infos`).
    impl: name of a lowering in `rewrite.implement` where the local op differs from the op (vocab-parallel embedding
        and cross entropy, batch norm over the global batch, masked or random ops); None: the same op on local
        shapes with localised size arguments.
    scale: the local result has to be divided by the axis size (a mean over a split dim). On one axis of several the
        factors multiply.
    groups: what is split consists of so many groups that stay together (channels of a group normalisation), so the
        ranks that split it must divide them; 0: of none. See `groups_fit`.

    Prints as ``n: R S(0) S(0) -> S(2)`` (``[impl]``, `` /n`` and `` *groups`` behind it) and parses back.
    """

    name: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    impl: str | None = None
    scale: bool = False
    groups: int = 0

    @property
    def is_split(self) -> bool:
        """Whether ranks do different work (false for replicated and dual)."""
        return self.name not in ("-", "d")

    def __str__(self) -> str:
        ins = " ".join(map(str, self.inputs))
        outs = " ".join(map(str, self.outputs))
        marks = (f"[{self.impl}]" if self.impl else "") + (" /n" if self.scale else "")
        return f"{self.name}: {ins} -> {outs}{marks}" + (f" *{self.groups}" if self.groups else "")

    @staticmethod
    @lru_cache(maxsize=65536)
    def parse(text: str) -> Strategy:
        """Inverse of ``str(strategy)``. Raises ValueError."""
        found = _TEXT.match(text)
        if not found:
            raise ValueError(f"not a strategy: {text!r}")
        return Strategy(
            found["name"],
            tuple(parse(part) for part in found["ins"].split()),
            tuple(parse(part) for part in found["outs"].split()),
            found["impl"],
            bool(found["scale"]),
            int(found["groups"] or 0),
        )


def groups_fit(chosen: Mapping[str, Strategy], mesh: Mesh) -> bool:
    """Whether no group that an op keeps together is cut when axis `a` of the mesh runs it by ``chosen[a]``."""
    grouped = {axis: strategy.groups for axis, strategy in chosen.items() if strategy.groups}
    ranks = math.prod(mesh.size(axis) for axis in grouped)
    return all(groups % ranks == 0 for groups in grouped.values())
