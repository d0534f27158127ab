"""What crosses between neighbouring segments, whatever the mesh."""

from __future__ import annotations

from torch import fx

from shardplan.planner.mixture import is_mixture
from shardplan.planner.trace import Trace, info, infos, is_tensor, resolve, tensor_args


class Boundaries:
    """Boundary i lies between segments i and i + 1.

    free[i]: the tensor there whose layout is free, made by one segment and read only by the next (the largest); None
    where there is none. crossing[i]: all tensors made up to segment i and read behind it. place[i]: where the free
    tensors in front of and behind segment i stand among what it reads and makes; equal for segments that may share
    their columns.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.mixes = any(map(is_mixture, trace.nodes()))
        home = {name: i for i, segment in enumerate(trace.segments) for name in segment.nodes}
        self.free: list[fx.Node | None] = [None] * len(trace.segments)
        self.crossing: list[list[fx.Node]] = [[] for _ in trace.segments]
        for name, made in home.items():
            node = trace.node(name)
            if not is_tensor(node):
                continue
            readers = {home[user.name] for user in node.users if user.name in home}
            for i in range(made, max(readers, default=made)):
                self.crossing[i].append(node)
            outside = all(user.name in home for user in node.users) and readers - {made} == {made + 1}
            best = self.free[made]
            larger = best is None or info(node).nbytes > info(best).nbytes
            if outside and info(node).dtype.is_floating_point and larger:
                self.free[made] = node
        self.place = [self._place(index) for index in range(len(trace.segments))]

    def before(self, index: int) -> fx.Node | None:
        """The free tensor that enters segment `index`."""
        return self.free[index - 1] if index else None

    def _place(self, index: int) -> tuple[int, int]:
        nodes = [self.trace.node(name) for name in self.trace.segments[index].nodes]
        inside = set(nodes)
        read: dict[fx.Node, None] = {}
        for node in nodes:
            if resolve(node)[0] is node and infos(node):
                read |= dict.fromkeys(a for a in tensor_args(node) if a not in inside)
        enters, leaves = self.before(index), self.free[index]
        return (
            list(read).index(enters) if enters is not None else -1,
            nodes.index(leaves) if leaves is not None else -1,
        )
