"""More drawings of the HTML report as inline SVG: bars of seconds, curves of memory, the topology, who holds what."""

from __future__ import annotations

from html import escape

from shardplan.planner.report.blocks import Curve, Curves, Map, Share, Shares, Topology
from shardplan.planner.report.words import nbytes_text, plural, ranges, seconds_text, share_text

_WIDTH = 1000.0
_MOST_NODES = 12
_MOST_COLUMNS = 64
_MOST_POINTS = 2400
"""Of all curves of a report together."""
_HUES = 8
"""Colours of stages, in turn (classes s0 .. s7 of the style sheet)."""


def share_svg(share: Share, shares: Shares) -> str:
    """A stacked bar of seconds that stretches to its box."""
    scale = _WIDTH / shares.scale_seconds
    parts = []
    x = 0.0
    for name, colour, seconds in share.parts:
        parts.append(
            f'<rect class="{colour}" x="{x:.1f}" y="0" width="{seconds * scale:.1f}" height="16">'
            f"<title>{escape(name)}, {seconds_text(seconds)}</title></rect>"
        )
        x += seconds * scale
    label = f"{share.name}: {share.text}"
    return (
        f'<svg class="bar" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:.0f} 16" '
        f'preserveAspectRatio="none">{"".join(parts)}</svg>'
    )


def curve_svg(curve: Curve, curves: Curves) -> str:
    """Bytes in use over the step, as steps, with the limit as a line; a bar's height, stretched to its box."""
    height = 64.0
    _, peak = curve.peak
    # A limit far above leaves no room for the curve itself.
    seen = curve.limit_nbytes if curve.limit_nbytes <= 4 * peak else 0
    top = max(peak, seen) * 1.04 or 1.0
    x_scale, y_scale = _WIDTH / curves.end_seconds, height / top
    points = _thinned(curve.points, max(_MOST_POINTS // max(len(curves.curves), 1), 60))
    path = [f"M0 {height:.0f}"]
    for (start, nbytes), (end, _) in zip(points, [*points[1:], (curves.end_seconds, 0)]):
        y = height - nbytes * y_scale
        path.append(f"L{start * x_scale:.1f} {y:.1f}L{end * x_scale:.1f} {y:.1f}")
    path.append(f"L{_WIDTH:.0f} {height:.0f}Z")
    limit = ""
    if seen:
        y = height - curve.limit_nbytes * y_scale
        limit = f'<rect class="limit" x="0" y="{y:.1f}" width="{_WIDTH:.0f}" height="1.5"/>'
    label = f"memory of {curve.name} over the step, at most {nbytes_text(peak)}"
    return (
        f'<svg class="curve" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
        f'preserveAspectRatio="none"><path class="activations" d="{"".join(path)}"/>{limit}</svg>'
    )


def _thinned(points: tuple[tuple[float, int], ...], most: int) -> list[tuple[float, int]]:
    """At most so many points that a file stays small: of neighbours the highest, so that peaks stay."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(group[0][0], max(nbytes for _, nbytes in group)) for group in groups]


def topology_svg(topology: Topology) -> str:
    """Nodes as boxes of devices, coloured by stage. Nodes beyond a dozen are counted, not drawn."""
    shown = topology.nodes[:_MOST_NODES]
    columns = min(len(shown), 4)
    per_row = 8
    cell, gap = 26.0, 4.0
    box = per_row * (cell + gap) + gap if max(len(d) for _, d in shown) > 4 else 4 * (cell + gap) + gap
    wide = int((box - gap) // (cell + gap))
    # A machine with very many devices shows the first of them.
    most = 4 * wide
    rows_of = [min(-(-len(devices) // wide), 4) for _, devices in shown]
    parts: list[str] = []
    y = 0.0
    for first in range(0, len(shown), columns):
        line = shown[first : first + columns]
        height = max(rows_of[first : first + columns]) * (cell + gap) + gap + 18
        for at, (node, devices) in enumerate(line):
            x = at * (box + 16)
            more = f", first {most} of {len(devices)} devices" if len(devices) > most else ""
            parts.append(f'<text class="small" x="{x:.0f}" y="{y + 11:.0f}">node {node}{more}</text>')
            parts.append(
                f'<rect class="node" x="{x:.0f}" y="{y + 16:.0f}" width="{box:.0f}" height="{height - 18:.0f}" rx="4"/>'
            )
            for place, (rank, kind, stage) in enumerate(devices[:most]):
                left = x + gap + place % wide * (cell + gap)
                top = y + 16 + gap + place // wide * (cell + gap)
                colour = f"s{stage % _HUES}" if stage >= 0 else "idle"
                text = f"device {rank}, {kind}, " + (f"stage {stage}" if stage >= 0 else "not used")
                box_of = f'x="{left:.0f}" y="{top:.0f}" width="{cell:.0f}" height="{cell:.0f}" rx="3"'
                parts.append(f'<rect class="{colour}" {box_of}><title>{escape(text)}</title></rect>')
                parts.append(f'<text class="on" x="{left + cell / 2:.0f}" y="{top + 17:.0f}">{rank}</text>')
        y += height + 10
    left = len(topology.nodes) - len(shown)
    if left:
        parts.append(f'<text x="0" y="{y + 12:.0f}">and {plural(left, "node")} more</text>')
        y += 18
    width = columns * (box + 16) - 16
    return (
        f'<svg class="topology" role="img" aria-label="devices by node and stage" viewBox="0 0 {width:.0f} {y:.0f}" '
        f'style="width:{width:.0f}px">{"".join(parts)}</svg>'
    )


def flow_lines(topology: Topology) -> list[str]:
    """What stages send each other a step, in words, the largest first."""
    flows = sorted(topology.flows, key=lambda flow: (-flow.nbytes, flow.source, flow.target))
    return [f"stage {f.source} to {f.target}: {nbytes_text(f.nbytes)} a step" for f in flows[:16]]


def node_lines(topology: Topology) -> list[str]:
    """Nodes and their devices by stage, in words; nodes that are alike share a line."""
    groups: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for node, devices in topology.nodes:
        stages: dict[int, list[int]] = {}
        for rank, _, stage in devices:
            stages.setdefault(stage, []).append(rank)
        text = ", ".join(
            (f"stage {stage}" if stage >= 0 else "unused") + f" on {ranges(ranks)}" for stage, ranks in stages.items()
        )
        kinds = "/".join(sorted({kind for _, kind, _ in devices}))
        groups.setdefault((kinds, len(devices)), []).append((node, text))
    lines = []
    for (kinds, count), nodes in groups.items():
        lines += [f"node {node} ({count} x {kinds}): {text}" for node, text in nodes[:8]]
        if len(nodes) > 8:
            lines.append(f"and {plural(len(nodes) - 8, 'node')} more of {count} x {kinds}")
    return lines


def map_table(found: Map) -> str:
    """Rows are layers, columns stages; a cell is as full as the share that one of its devices holds."""
    columns = found.columns[:_MOST_COLUMNS]
    head = "".join(
        f'<th title="devices {escape(devices)}">{"stage " if len(columns) <= 8 else ""}{stage}</th>'
        for devices, stage in columns
    )
    rows = []
    for part, nbytes, shares in found.rows:
        cells = []
        for (devices, stage), share in zip(columns, shares):
            if share <= 0:
                cells.append("<td></td>")
                continue
            title = f"{part}: {share_text(share)} of {nbytes_text(nbytes)} on each of devices {devices}"
            fill = f'<i class="s{stage % _HUES}" style="width:{max(share, 0.04) * 100:.0f}%"></i>'
            cells.append(f'<td title="{escape(title)}">{fill}</td>')
        rows.append(
            f'<tr><td class="name">{escape(part)}</td><td class="n">{nbytes_text(nbytes)}</td>{"".join(cells)}</tr>'
        )
    left = len(found.columns) - len(columns)
    more = f'<p class="dim">and {plural(left, "stage")} more</p>' if left > 0 else ""
    return (
        '<div class="scroll"><table class="map"><thead><tr><th>part of the model</th><th class="n">bytes</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}"
    )
