"""Parameters that are stored in parts: what a stage's code calls to use them (see `planner.storage`).

Level 3. ``start`` begins to gather the parameters of a segment, ``finish`` gives them whole; a stage starts the next
segment's gathering before it computes the present one, so that it runs meanwhile. ``around`` runs the segment in such a
way that autograd keeps none of the whole parameters: where backward asks for one, the segment's are gathered again, and
those of the segment before it are started. In a segment that is recomputed in backward, ``finish`` is called again.

Level 2. ``resident`` hands out parameters that stay whole.

At both levels backward ends with one reduce-scatter of the segment's gradients, which is added to the ``grad`` of the
parts when the next one starts, or at ``settle``, which whoever ran backward calls. Autograd itself gives the parts no
gradient. All ranks of a stage run the same code, so these collectives come in the same order on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from shardplan.planner.storage import Storage, part_extent, span
from shardplan.rewrite.comm import Comm

Place = tuple[str, int, int, bool, torch.dtype | None]
"""(axis, dim, extent of that dim of the whole, whether every rank of the axis has only a summand of the gradient, dtype
of the whole where it is not that of the parts)."""


class Gathering:
    """The stored parts of one segment's parameters, and the whole ones while they are in use."""

    __slots__ = ("_comm", "_held", "_known", "_pending", "_places", "_previous", "_shards")

    def __init__(
        self, comm: Comm, places: tuple[Place, ...], shards: tuple[torch.Tensor, ...], previous: Gathering | None
    ) -> None:
        self._comm = comm
        self._places = places
        self._shards = shards
        self._previous = previous
        self._pending: Callable[[], list[torch.Tensor]] | None = None
        self._held: list[torch.Tensor] | None = None
        self._known: dict[int, tuple[int, torch.Tensor]] | None = None
        self.start()

    def start(self) -> None:
        """Begin to gather, unless that has happened or the whole parameters are here."""
        if self._pending is None and self._held is None:
            self._pending = gather(self._comm, self._places, [shard.detach() for shard in self._shards])

    def whole(self) -> list[torch.Tensor]:
        """The whole parameters, which the caller keeps. In backward the segment before this one is started."""
        self.start()
        found = self._held
        if self._pending is not None:
            found, self._pending = self._pending(), None
        if self._previous is not None and in_backward():
            self._previous.start()
            self._previous = None
        assert found is not None
        return found

    def use(self) -> tuple[torch.Tensor, ...]:
        """The whole parameters as results of the parts."""
        wholes = self.whole()
        if self._known is not None:
            self._known = {whole.untyped_storage()._cdata: (i, whole) for i, whole in enumerate(wholes)}
        return _Use.apply(self, tuple(wholes), *self._shards)  # type: ignore[return-value]

    def again(self, position: int) -> torch.Tensor:
        """A whole parameter, for backward: kept until the gradients of the segment are there."""
        self._held = self.whole()
        return self._held[position]

    def watch(self) -> None:
        """From now on `position` is asked. Whole parameters are kept: another tensor may not come to lie where one
        was."""
        self._known = {}

    def position(self, tensor: torch.Tensor) -> int | None:
        """Which parameter the tensor is, or looks at."""
        found = self._known.get(tensor.untyped_storage()._cdata) if self._known is not None else None
        return found[0] if found is not None else None

    def forget(self) -> None:
        """Undo `watch`."""
        self._known = None

    def scatter(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Backward of the segment is over."""
        self._held = None
        scatter(self._comm, self._places, self._shards, gradients)


class _Use(Function):
    """parts -> whole parameters; backward sums up the gradients and gives every rank its part."""

    @staticmethod
    def forward(
        ctx: Any, gathering: Gathering, wholes: tuple[torch.Tensor, ...], *shards: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.gathering = gathering
        ctx.set_materialize_grads(False)
        return wholes

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        ctx.gathering.scatter(gradients)
        ctx.gathering = None
        return (None, None, *(None for _ in gradients))


class _Resident(Function):
    """parts -> the whole parameters beside them; backward as of `_Use`."""

    @staticmethod
    def forward(
        ctx: Any,
        comm: Comm,
        places: tuple[Place, ...],
        wholes: tuple[torch.Tensor, ...],
        *shards: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.comm, ctx.places, ctx.shards = comm, places, shards
        ctx.set_materialize_grads(False)
        return tuple(whole.view_as(whole) for whole in wholes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        scatter(ctx.comm, ctx.places, ctx.shards, gradients)
        return (None, None, None, *(None for _ in gradients))


# -- what stage code calls ---------------------------------------------------------------------------------------------


def start(
    comm: Comm, places: tuple[Place, ...], shards: tuple[torch.Tensor, ...], previous: Gathering | None = None
) -> Gathering:
    """Begin to gather the parameters of a segment. previous: of the segment before it."""
    return Gathering(comm, places, shards, previous)


def finish(gathering: Gathering) -> tuple[torch.Tensor, ...]:
    """The segment's parameters, whole."""
    return gathering.use()


def resident(
    comm: Comm, places: tuple[Place, ...], shards: tuple[torch.Tensor, ...], wholes: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Whole parameters whose gradients go to the parts."""
    return _Resident.apply(comm, places, wholes, *shards)  # type: ignore[return-value]


def around(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, where one of the arguments is the `Gathering` of what it uses."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    gathering = next(value for value in arguments if isinstance(value, Gathering))

    def pack(tensor: torch.Tensor) -> Any:
        position = gathering.position(tensor) if tensor.layout == torch.strided else None
        if position is None:
            return tensor
        return position, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        position, dtype, shape, stride, offset = packed
        whole = gathering.again(position)
        return (whole if whole.dtype == dtype else whole.view(dtype)).as_strided(shape, stride, offset)

    gathering.watch()
    try:
        with saved_tensors_hooks(pack, unpack):
            return function(*arguments)
    finally:
        gathering.forget()


def settle(comm: Comm, but: int = 0) -> None:
    """Add to the parts' gradients what is still under way, but for the last so many messages. Whoever ran backward
    calls it."""
    while len(comm.unsettled) > but:
        comm.unsettled.pop(0)()


def in_backward() -> bool:
    """Whether autograd is running backward in this thread."""
    return torch._C._current_graph_task_id() != -1


# -- messages ----------------------------------------------------------------------------------------------------------


def gather(
    comm: Comm, places: Sequence[Place], shards: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
) -> Callable[[], list[torch.Tensor]]:
    """Begin to gather parts, one message for each axis and dtype. -> what waits for the whole tensors, which are those
    of `into` where that is given."""
    shards = [shard.to(place[4] or shard.dtype) for shard, place in zip(shards, places, strict=True)]
    buckets: dict[tuple[str, torch.dtype], list[int]] = {}
    for i, shard in enumerate(shards):
        buckets.setdefault((places[i][0], shard.dtype), []).append(i)
    arrivals = []
    for (axis, _), numbers in buckets.items():
        rows = [_padded(shards[i], places[i], comm.size(axis)) for i in numbers]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        arrivals.append((axis, numbers, [len(row) for row in rows], comm.start_all_gather(flat, axis)))

    def wait() -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for axis, numbers, lengths, arrive in arrivals:
            size = comm.size(axis)
            columns = arrive().view(size, -1).split(lengths, 1)
            for i, column in zip(numbers, columns, strict=True):
                shape = _largest(shards[i], places[i], size)
                found[i] = _joined(column, places[i], shape, None if into is None else into[i])
        return [found[i] for i in range(len(shards))]

    return wait


def scatter(
    comm: Comm,
    places: Sequence[Place],
    shards: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    beside: int = 0,
) -> None:
    """Begin to add this rank's part of the gradients, summed over the axis where they are summands, to the parts'; a
    parameter without a gradient has none on any rank. beside: so many earlier messages may still be under way."""
    settle(comm, beside)
    buckets: dict[tuple[str, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for i, (shard, gradient) in enumerate(zip(shards, gradients, strict=True)):
        if gradient is None or not shard.requires_grad:
            continue
        axis, summand = places[i][0], places[i][3]
        gradient = gradient.to(shard.dtype)
        if summand:
            buckets.setdefault((axis, gradient.dtype), []).append((i, gradient))
        else:
            _add(shard, part_of_local(gradient, places[i], comm.size(axis), comm.index(axis)).contiguous())
    for (axis, _), held in buckets.items():
        rows = [_by_rank(gradient, places[i], comm.size(axis)) for i, gradient in held]
        lengths = [row.shape[1] for row in rows]
        arrive = comm.start_reduce_scatter(rows[0] if len(rows) == 1 else torch.cat(rows, 1), axis)

        def take(
            numbers: list[int] = [i for i, _ in held],  # noqa: B006
            size: int = comm.size(axis),
            lengths: list[int] = lengths,
            arrive: Callable[[], torch.Tensor] = arrive,
        ) -> None:
            for i, part in zip(numbers, arrive().split(lengths), strict=True):
                mine = part.view(_largest(shards[i], places[i], size))
                dim = places[i][1]
                _add(shards[i], mine.narrow(dim, 0, shards[i].shape[dim]))

        comm.unsettled.append(take)


def part_of_local(local: torch.Tensor, place: Place, size: int, index: int) -> torch.Tensor:
    """A rank's part of a whole local tensor, a view."""
    _, dim, extent, *_ = place
    low, high = span(extent, size, index)
    return local.narrow(dim, low, high - low)


def joined(
    parts: Mapping[tuple[tuple[str, int], ...], torch.Tensor], storage: Storage
) -> dict[tuple[tuple[str, int], ...], torch.Tensor]:
    """What was split for storage, put together: the same on all ranks of the storage's axis."""
    along: dict[tuple[tuple[str, int], ...], dict[int, torch.Tensor]] = {}
    for place, part in parts.items():
        rest = tuple(item for item in place if item[0] != storage.axis)
        along.setdefault(rest, {})[dict(place)[storage.axis]] = part
    whole = {rest: torch.cat([found[i] for i in sorted(found)], storage.dim) for rest, found in along.items()}
    return {place: whole[tuple(item for item in place if item[0] != storage.axis)] for place in parts}


def _largest(shard: torch.Tensor, place: Place, size: int) -> tuple[int, ...]:
    """Shape of the largest part."""
    _, dim, extent, *_ = place
    return (*shard.shape[:dim], part_extent(extent, size), *shard.shape[dim + 1 :])


def _padded(shard: torch.Tensor, place: Place, size: int) -> torch.Tensor:
    """-> [elements of the largest part]."""
    shape = _largest(shard, place, size)
    if tuple(shard.shape) == shape:
        return shard.reshape(-1)
    padded = shard.new_zeros(shape)
    padded.narrow(place[1], 0, shard.shape[place[1]]).copy_(shard)
    return padded.view(-1)


def _joined(rows: torch.Tensor, place: Place, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
    """rows: [ranks, elements of the largest part], parts of that shape. -> the whole, in `into` or in new memory."""
    _, dim, extent, *_ = place
    if into is not None:
        for index, row in enumerate(rows.unflatten(1, shape).unbind()):
            start, stop = span(extent, len(rows), index)
            into.narrow(dim, start, stop - start).copy_(row.narrow(dim, 0, stop - start))
        return into
    whole = torch.cat(rows.unflatten(1, shape).unbind(), dim)
    return whole if whole.shape[dim] == extent else whole.narrow(dim, 0, extent).clone()


def _by_rank(whole: torch.Tensor, place: Place, size: int) -> torch.Tensor:
    """-> [ranks, elements of the largest part]."""
    _, dim, extent, *_ = place
    rows = part_extent(extent, size)
    if rows * size != extent:
        padded = whole.new_zeros((*whole.shape[:dim], rows * size, *whole.shape[dim + 1 :]))
        padded.narrow(dim, 0, extent).copy_(whole)
        whole = padded
    return whole.unflatten(dim, (size, rows)).movedim(dim, 0).reshape(size, -1)


def _add(shard: torch.Tensor, gradient: torch.Tensor) -> None:
    if shard.grad is None:
        shard.grad = gradient.to(shard.dtype)
    else:
        shard.grad.add_(gradient)
