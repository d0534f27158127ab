"""What it costs to store parameters in parts (`planner.storage`): options of a parameter beside the split of its use.

Of a parameter with b local bytes, n replicas on "dp", parts of b' = b / n (padded), optimizer state of f bytes a byte,
m microbatches; RS, AG, AR: seconds a byte of the collectives, opt: of the optimizer, copy: of reading and writing.

=====  ==================================  ===========================================  ===============
level  once a step                         every microbatch                             bytes held
=====  ==================================  ===========================================  ===============
0      AR b + copy b + opt b               copy b (m - 1) / m: adds to the gradient     b (2 + f)
1      RS b + AG b + 2 copy b + opt b'     as 0                                         2 b + f b'
2      AG b + copy b + opt b'              RS b + copy b, and copy b' (m - 1) / m       b + (1 + f) b'
3      opt b'                              as 2; forward and backward: AG b + copy b    (2 + f) b'
=====  ==================================  ===========================================  ===============

A sum that is to be taken over "tp" as well comes once a step, of the parts. Parameters that are stored in a higher
precision than they are used in (`planner.precision`) are gathered as they are used; gradients and the optimizer have
them as they are stored, and at level 2 the part is held besides; level 1 is not for them. A frozen parameter is whole
or of level 3, without anything that concerns gradients.

Messages of a microbatch run while a segment computes: its gather while the one before it does, its reduce-scatter while
the one behind it in backward does. Segments are alike, so of their seconds counts what exceeds the computing of the
segment itself, by its fastest splits, and of the rest what computing loses beside a message (on a CPU most of it: the
rank's own core moves the bytes). That is a factor of the segment and the level alone, so prices stay sums over
parameters. What a stage's first gather and last reduce-scatter cannot hide behind is left out.

While a segment runs backward it holds its whole parameters, their gradients and the parameters of the segment before
it; while gradients are sent, the gradients, what is sent and what arrives. Other than what ops hold, this adds up over
the parameters of a segment: `Price.gathered_nbytes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.placement import D, Placement, local_shape
from shardplan.planner.search.op_prices import SAMPLE_NBYTES
from shardplan.planner.search.problem import Price
from shardplan.planner.storage import Storage, best_dim, part_shape
from shardplan.planner.trace import info

if TYPE_CHECKING:
    from shardplan.planner.search.columns import Columns

AUTO = (0, 1, 2, 3)
"""Levels among which a parameter's may be chosen; 0: stored as it is used."""
"""Messages of once a step travel in buckets, so a parameter costs its share of a large one."""
_SENT = {2: 3, 3: 2}
"""Gradients of a segment's parameters at once, beside (level 3) twice the parameters, see module docstring."""


@dataclass(frozen=True, slots=True)
class Window:
    """Of one segment. forward_seconds, backward_seconds: what its ops take at least; nbytes: of all its parameters on
    one rank at least, which travel together."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Stored:
    """One way to store a parameter (None: as it is used), its price, and how many of its bytes are held and stepped on
    by this rank: parameter, gradient, optimizer state (in bytes of the parameter)."""

    storage: Storage | None
    price: Price
    parameter_nbytes: float
    gradient_nbytes: float = 0.0
    optimized_nbytes: float = 0.0


def ways_to_store(
    columns: Columns, node: fx.Node, tp: Placement, window: Window, levels: tuple[int, ...]
) -> list[Stored]:
    """The options of a parameter or buffer whose use is split by `tp`; what is not possible is left out, at least the
    whole one stays."""
    source = columns.trace.sources[node.name]
    nbytes = columns.local_nbytes(node, tp)
    trainable = source.trainable and columns.training
    rounded = source.name in columns.trace.masters
    stored = columns.stored_nbytes(node, nbytes)
    held = stored + nbytes * rounded
    whole = Stored(None, columns.parameter_price(node, tp), held, stored * trainable, stored * trainable)
    replicas = len(columns.dp_ranks)
    layout = columns.layout(node, tp)
    shape = local_shape(info(node).shape, layout, columns.mesh)
    dim = best_dim(shape, replicas)
    at = columns.mesh.axes.index("dp")
    if source.kind != "param" or replicas == 1 or dim is None or layout[at].is_shard:
        return [whole]
    part = columns.stored_nbytes(node, float(math.prod(part_shape(shape, dim, replicas)) * info(node).dtype.itemsize))
    apart = rounded or (dim > 0 and math.prod(shape[:dim]) > 1)  # the part is no view of the whole
    made = _Maker(columns, nbytes, stored, part, apart, window, len(columns.tp_ranks) > 1 and layout[-1] == D)
    found = [whole] if 0 in levels or (not trainable and 3 not in levels) else []
    for level in (1, 2, 3) if trainable else (3,):
        if level in levels and not (rounded and level == 1):
            found.append(made.stored(Storage(level, "dp", dim), trainable))
    return found or [whole]


def scattering(columns: Columns, nbytes: float) -> float:
    """Seconds of a gradient's way to the parts of level 1, once a step. nbytes: of the gradient."""
    sample = columns.costs.collective("reduce_scatter", SAMPLE_NBYTES, columns.dp_ranks)
    sent = sample * nbytes / SAMPLE_NBYTES * columns.costs.overheads(0).reduce
    return sent + columns.costs.copy(round(nbytes), 0)


@dataclass(slots=True)
class _Maker:
    """Bytes of the parameter as it is used and as it is stored, and of its stored part."""

    columns: Columns
    nbytes: float
    stored_nbytes: float
    part: float
    apart: bool
    window: Window
    tensor_summand: bool

    def stored(self, storage: Storage, trainable: bool) -> Stored:
        level = storage.level
        copy = self.columns.costs.copy(round(self.nbytes), 0)
        sent = self.columns.costs.copy(round(self.stored_nbytes), 0)
        forward = backward = again = once = 0.0
        parameter, gradient = (self.part if level == 3 else self.nbytes + self.part * self.apart), self.part
        if trainable:
            once = self.columns.costs.optimizer(round(self.part), 0) + self._tensor_sum()
            if level == 1:
                gradient = self.nbytes
                once += scattering(self.columns, self.stored_nbytes)
                backward += self.columns.adding_seconds(self.nbytes)
            else:
                backward += self._exposed("reduce_scatter", self._shown(level)) * self._widening() + sent
                backward += self.columns.adding_seconds(self.part)
            if level < 3:
                once += self._bucketed("all_gather", self.nbytes) + copy
        if level == 3:
            gathering = self._seconds("all_gather")
            hidden = min(self.window.forward_seconds / gathering, 1.0) if gathering else 1.0
            forward = self._exposed("all_gather", 1.0 - hidden) + copy
            again = self._exposed("all_gather", self._shown(level)) + copy if self.columns.training else 0.0
        optimized = self.part * trainable
        held = parameter + gradient * trainable + self.columns.optimizer_factor * optimized
        gathered = 2 * self.nbytes * (level == 3) + trainable * _SENT.get(level, 0) * self.stored_nbytes
        price = Price(forward, backward, once, held, 0.0, 0.0, again, gathered)
        return Stored(storage, price, parameter, gradient * trainable, optimized)

    def _tensor_sum(self) -> float:
        return self._share("all_reduce", self.part, self.columns.tp_ranks) if self.tensor_summand else 0.0

    def _bucketed(self, kind: str, nbytes: float) -> float:
        return self._share(kind, nbytes, self.columns.dp_ranks)

    def _widening(self) -> float:
        """How much larger gradients are than what is gathered."""
        return self.stored_nbytes / self.nbytes if self.nbytes else 1.0

    def _share(self, kind: str, nbytes: float, ranks: tuple[int, ...]) -> float:
        sample = self.columns.costs.collective(kind, SAMPLE_NBYTES, ranks)
        return sample * nbytes / SAMPLE_NBYTES * self.columns.costs.overheads(0).reduce

    def _seconds(self, kind: str) -> float:
        """Of one message of all the segment's parameters."""
        nbytes = max(self.window.nbytes, self.nbytes)
        return self.columns.collective_seconds(kind, round(nbytes), self.columns.dp_ranks)

    def _exposed(self, kind: str, share: float) -> float:
        """Seconds that this parameter's part of the segment's message adds. share: of it, what does not run while the
        segment computes; the rest takes from the computing what such messages take (`Costs.slowdown`)."""
        lost = max(self.columns.costs.slowdown("all_reduce", self.columns.dp_ranks))
        return self._seconds(kind) * self.nbytes / max(self.window.nbytes, self.nbytes) * (share + lost * (1.0 - share))

    def _shown(self, level: int) -> float:
        """The share of backward's messages that exceeds its computing."""
        total = self._seconds("reduce_scatter") * self._widening() + (
            self._seconds("all_gather") if level == 3 else 0.0
        )
        return max(total - self.window.backward_seconds, 0.0) / total if total else 0.0
