"""What parameters that are stored in parts (`planner.storage`) add to the bytes of a stage's segments while they run.

Of a segment, W: bytes of its whole parameters of level 3; G: of the whole gradients of those of levels 2 and 3.
In forward the parameters lie there twice while they are put together, then once, and those of the next segment arrive.
In backward those of the segment before it arrive; gradients are whole until the segment is done, and are then there
three times (made, packed, arriving), of which packed and arriving ones stay until the next segment's are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.rules import Strategy
from shardplan.planner.search.liveness import SegmentBytes
from shardplan.planner.search.storing import Window, ways_to_store
from shardplan.planner.storage import Storage

if TYPE_CHECKING:
    from shardplan.planner.search.columns import Columns


@dataclass(frozen=True, slots=True)
class Gathered:
    """Bytes of one segment. whole: W; sent: G; parts: of those gradients, what stays here; apart: of gradients that do
    not lie in buckets for all-reduce (level 1 and above)."""

    whole: float = 0.0
    sent: float = 0.0
    parts: float = 0.0
    apart: float = 0.0


def gathered_by(
    columns: Columns, held: Iterable[fx.Node], chosen: Mapping[str, Strategy], stored: Mapping[str, Storage]
) -> Gathered:
    """held: parameters of a segment; stored: by node."""
    whole = sent = parts = apart = 0.0
    for node in held:
        if node.name not in stored:
            continue
        level = stored[node.name].level
        placement = columns.placement(chosen, node)
        (way,) = ways_to_store(columns, node, placement, Window(), (level,))
        nbytes = columns.local_nbytes(node, placement)
        apart += way.gradient_nbytes
        if level == 3:
            whole += nbytes
        if level > 1 and way.gradient_nbytes:
            sent += columns.stored_nbytes(node, nbytes)
            parts += way.gradient_nbytes
    return Gathered(whole, sent, parts, apart)


def with_gathered(segments: Sequence[SegmentBytes], gathered: Sequence[Gathered]) -> list[SegmentBytes]:
    """The segments of a stage, in order, with what storage adds."""
    found = []
    for i, (segment, mine) in enumerate(zip(segments, gathered, strict=True)):
        earlier = gathered[i - 1] if i else Gathered()
        later = gathered[i + 1] if i + 1 < len(gathered) else Gathered()
        arriving = earlier.whole + 2 * later.sent
        least = max(segment.kept + 2 * mine.whole + arriving, 3 * mine.sent + earlier.whole)
        found.append(
            replace(
                segment,
                forward=later.whole + mine.whole + max(segment.forward, mine.whole),
                first=max(segment.first + mine.whole + arriving, least),
                later=max(segment.later + mine.sent + mine.whole + arriving, least),
                gradients=segment.gradients - mine.sent + mine.parts,
            )
        )
    return found
