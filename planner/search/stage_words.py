"""Runs of segments by what they consist of, and min-plus products over all of them at once.

Models repeat: of the n (n + 1) / 2 runs of n segments most are equal, segment by segment. A *word* is a class of equal
runs: the same columns in the same order, entered over the same boundary. A word is its prefix and one more segment, so
for tables T[kind, r, a, b] (least price of a segment by columns that enter in layout a and leave in b; r = 1: that
recompute their activations) the product

    D[w, k, a, b] = least sum over the word's segments, k of which are recomputed

follows from that of its prefix: D[w, k] = min (D[prefix, k] x T[last, 0], D[prefix, k - 1] x T[last, 1]). From a number
of them on, all counts are one: D[w, K] is the least of K or more.
"""

from __future__ import annotations

import math

import numpy as np

from shardplan.planner.search.stage_ilp import Column, StageProblem

Numbers = np.ndarray


class Words:
    """number[i, n]: word of segments [i, i + n), or -1. Words are ordered by length: those of n segments are
    starts[n] .. starts[n + 1]. parent: the word without its last segment (-1), last: kind of that, first: one segment
    with which a run of the word begins. members: per kind, one segment of it. received, send: [segment, layout], bytes
    that stay of what enters a segment, seconds of its message. transients: [word], bytes that every run of the word
    needs while it computes. counts: [word, kind], how many segments of a kind there are. own: [kind], bytes that a
    segment needs while it computes. from_start: only runs that begin with the first segment."""

    def __init__(
        self,
        problem: StageProblem,
        most: int,
        transients: tuple[float, ...],
        again: tuple[float, ...],
        from_start: bool = False,
    ) -> None:
        self.count, self.most, self.from_start = len(problem.columns), most, from_start
        self.width = 1 + max(max(c.enters, c.leaves) for columns in problem.columns for c in columns)
        self.received = np.zeros((self.count + 1, self.width))
        self.send = np.full((self.count + 1, self.width), math.inf)
        self.send[0, 0] = 0.0
        for i, (seconds, nbytes) in enumerate(zip(problem.cut_seconds, problem.cut_nbytes, strict=True)):
            for layout, value in seconds.items():
                if layout < self.width:
                    self.send[i + 1, layout] = value
            for layout, value in nbytes.items():
                if layout < self.width:
                    self.received[i + 1, layout] = value
        self.members: list[int] = []
        self.again = np.array(again)
        self.kinds = self._kinds(problem, transients, again)
        self._number(transients)

    def _kinds(self, problem: StageProblem, transients: tuple[float, ...], again: tuple[float, ...]) -> list[int]:
        known: dict[object, int] = {}
        kinds = []
        for i, columns in enumerate(problem.columns):
            kind = known.setdefault((id(columns), transients[i], again[i]), len(known))
            if kind == len(self.members):
                self.members.append(i)
            kinds.append(kind)
        return kinds

    def _number(self, transients: tuple[float, ...]) -> None:
        self.number = np.full((self.count, self.most + 1), -1)
        self.parent, self.last, self.first, self.starts = [], [], [], [0]
        needs: list[float] = []
        counts: list[Numbers] = []
        one = np.eye(len(self.members), dtype=np.int32)
        for length in range(1, self.most + 1):
            self.starts.append(len(self.parent))
            known: dict[object, int] = {}
            for i in range(1 if self.from_start else self.count - length + 1):
                end = i + length - 1
                parent = int(self.number[i, length - 1])
                entry = parent if length > 1 else (self.received[i].tobytes(), self.send[i].tobytes())
                key = entry, self.kinds[end]
                if key not in known:
                    known[key] = len(self.parent)
                    self.parent.append(parent)
                    self.last.append(self.kinds[end])
                    self.first.append(i)
                    needs.append(max(transients[end], needs[parent] if length > 1 else 0.0))
                    counts.append(one[self.kinds[end]] + (counts[parent] if length > 1 else 0))
                self.number[i, length] = known[key]
        self.starts.append(len(self.parent))
        self.transients = np.array(needs)
        self.counts = np.array(counts)
        self.own = np.array([transients[member] for member in self.members])

    def __len__(self) -> int:
        return len(self.parent)

    def by_kind(self, problem: StageProblem) -> list[tuple[Column, ...]]:
        """Columns of every kind."""
        return [problem.columns[i] for i in self.members]

    def needs(self, counted: int) -> Numbers:
        """[word, k]: bytes that a run of the word needs while it computes, k of its segments recomputed: where all are
        different, the least of them that can be the worst of k."""
        found = np.repeat(self.transients[:, None], counted + 1, 1)
        for length in range(1, self.most + 1):
            for word in range(self.starts[length], self.starts[length + 1]):
                first = self.first[word]
                least = np.sort(self.again[first : first + length])[:counted]
                found[word, 1 : len(least) + 1] = np.maximum(found[word, 0], least)
        return found

    def products(self, tables: Numbers, most: int) -> Numbers:
        """[weighting, kind, 2, a, b] -> [weighting, word, min(recomputed, most), a, b]."""
        weightings = tables.shape[0]
        found = np.full((weightings, len(self), most + 1, self.width, self.width), math.inf)
        last, parent = np.array(self.last), np.array(self.parent)
        again_at = min(1, most)
        for length in range(1, self.most + 1):
            here = slice(self.starts[length], self.starts[length + 1])
            kept, again = tables[:, last[here], 0], tables[:, last[here], 1]
            if length == 1:
                found[:, here, 0] = kept
                found[:, here, again_at] = np.minimum(found[:, here, again_at], again)
                continue
            counts = min(length - 1, most) + 1  # of the prefix
            before = found[:, parent[here], :counts]
            found[:, here, :counts] = _product(before, kept)
            more = _product(before, again)
            top = min(counts, most)  # the prefix's counts, each one higher; the last of them may be "most or more"
            found[:, here, 1 : top + 1] = np.minimum(found[:, here, 1 : top + 1], more[:, :, :top])
            if counts == most + 1:
                found[:, here, most] = np.minimum(found[:, here, most], more[:, :, most])
        return found


def _product(before: Numbers, table: Numbers) -> Numbers:
    """[w, x, k, a, m], [w, x, m, b] -> [w, x, k, a, b]."""
    found = before[..., 0, None] + table[:, :, None, None, 0, :]
    for middle in range(1, table.shape[2]):
        np.minimum(found, before[..., middle, None] + table[:, :, None, None, middle, :], out=found)
    return found
