"""More drawings of the HTML report: bars of seconds, curves of memory, the topology, who holds what, what-if curves."""

from __future__ import annotations

import math
from html import escape

from shardplan.planner.report.blocks import Curve, Curves, Map, Plot, Share, Shares, Topology
from shardplan.planner.report.words import nbytes_text, plural, ranges, seconds_text, share_text

_WIDTH = 1000.0
_MOST_NODES = 12
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
    # Wide enough for what stands above it.
    box = per_row * (cell + gap) + gap
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
            text = f"node {node}{more}"
            if inside := topology.inside.get(node):
                text += f": {nbytes_text(inside)} a step inside"
            if out := sum(nbytes for (source, _), nbytes in topology.between.items() if source == node):
                text += f", {nbytes_text(out)} out" if inside else f": {nbytes_text(out)} a step out"
            parts.append(f'<text class="small" x="{x:.0f}" y="{y + 11:.0f}">{text}</text>')
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


def traffic_lines(topology: Topology) -> list[str]:
    """Bytes of a step on the links between nodes, in words, the most first; pairs with the same bytes share a line."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for pair, nbytes in sorted(topology.between.items(), key=lambda item: (-item[1], item[0])):
        groups.setdefault(nbytes_text(nbytes), []).append(pair)
    lines = []
    for text, pairs in list(groups.items())[:8]:
        shown = ", ".join(f"{a} to {b}" for a, b in pairs[:6]) + (", ..." if len(pairs) > 6 else "")
        lines.append(f"node {shown}: {text} a step" + (" each" if len(pairs) > 1 else ""))
    return lines


def node_lines(topology: Topology) -> list[str]:
    """Nodes and their devices by stage, in words; neighbouring nodes that hold the same stages share a line."""
    groups: list[tuple[tuple[object, ...], list[int], dict[int, list[int]]]] = []
    for node, devices in topology.nodes:
        stages: dict[int, list[int]] = {}
        for rank, _, stage in devices:
            stages.setdefault(stage, []).append(rank)
        key = (tuple(sorted({kind for _, kind, _ in devices})), len(devices), tuple(stages))
        if not groups or groups[-1][0] != key:
            groups.append((key, [], {}))
        groups[-1][1].append(node)
        for stage, ranks in stages.items():
            groups[-1][2].setdefault(stage, []).extend(ranks)
    lines = []
    for (kinds, count, _), nodes, stages in groups[:16]:
        text = ", ".join(
            (f"stage {stage}" if stage >= 0 else "unused") + f" on {ranges(ranks)}" for stage, ranks in stages.items()
        )
        name = f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {ranges(nodes)}"
        each = " each" if len(nodes) > 1 else ""
        lines.append(f"{name} ({count} x {'/'.join(map(str, kinds))}{each}): {text}")  # type: ignore[arg-type]
    if len(groups) > 16:
        lines.append(f"and {plural(sum(len(nodes) for _, nodes, _ in groups[16:]), 'node')} more")
    return lines


def map_table(found: Map) -> str:
    """Rows are layers, columns devices; a cell shows which part of the layer the device holds."""
    head = "".join(f'<th class="at" title="stage {stage}">{escape(device)}</th>' for device, stage in found.columns)
    rows = []
    for part, nbytes, slices in found.rows:
        cells = []
        for (device, stage), (start, share) in zip(found.columns, slices, strict=True):
            if share <= 0:
                cells.append("<td></td>")
                continue
            title = f"{part}: device {device} of stage {stage} holds {share_text(share)}"
            title += f" of {nbytes_text(nbytes)}" + (f", from {share_text(start)} on" if start else "")
            left = min(start, 0.97) * 100
            fill = f'<i class="s{stage % _HUES}" style="margin-left:{left:.0f}%;width:{max(share * 100, 3):.0f}%"></i>'
            cells.append(f'<td title="{escape(title)}">{fill}</td>')
        rows.append(
            f'<tr><td class="name">{escape(part)}</td><td class="n">{nbytes_text(nbytes)}</td>{"".join(cells)}</tr>'
        )
    more = f'<p class="dim">{escape(found.note)}</p>' if found.note else ""
    return (
        '<p class="dim">A cell is as wide as the layer; the bar in it is the part that the device above holds, in its '
        "stage's colour.</p>"
        '<div class="scroll" tabindex="0"><table class="map"><thead><tr><th>layer</th><th class="n">bytes each</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}"
    )


def plot_svg(plot: Plot) -> str:
    """A curve with its points; the point of the plan itself is filled."""
    width, height, left, bottom, top = 460.0, 210.0, 62.0, 44.0, 12.0
    xs, ys = [x for x, _, _ in plot.points], [y for _, y, _ in plot.points]
    here = next((y for x, y, _ in plot.points if x == plot.marked), ys[0])
    even = [(x, here * x / plot.marked) for x in (xs[0], xs[-1])] if plot.even and plot.marked else []
    high = max([*ys, *(y for _, y in even)]) * 1.08 or 1.0
    span = xs[-1] - xs[0] or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - xs[0]) / span * (width - left - 18), top + (1 - y / high) * (height - top - bottom)

    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in points))

    base = height - bottom
    parts = [f'<line x1="{left:.0f}" y1="{base:.0f}" x2="{width - 10:.0f}" y2="{base:.0f}"/>']
    for y in _ticks(high):
        _, row = at(xs[0], y)
        parts.append(f'<line class="grid" x1="{left:.0f}" y1="{row:.1f}" x2="{width - 10:.0f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="small end" x="{left - 6:.0f}" y="{row + 4:.1f}">{y:,.4g}</text>')
    shown = -1e9
    for x in xs:
        column, _ = at(x, 0)
        if column - shown > 40:
            parts.append(f'<text class="small middle" x="{column:.1f}" y="{base + 16:.0f}">{x:,.4g}</text>')
            shown = column
    if even:
        parts.append(f'<path class="even" d="{path(even)}"/>')
    parts.append(f'<path class="line" d="{path([(x, y) for x, y, _ in plot.points])}"/>')
    for x, y, words in plot.points:
        column, row = at(x, y)
        kind = "point here" if x == plot.marked else "point"
        parts.append(
            f'<circle class="{kind}" cx="{column:.1f}" cy="{row:.1f}" r="4.5"><title>{escape(words)}</title></circle>'
        )
    foot = plot.x_name + ("; dashed: in proportion" if even else "")
    parts.append(f'<text class="small middle" x="{(left + width) / 2:.0f}" y="{height - 4:.0f}">{escape(foot)}</text>')
    label = f"{plot.y_name} over {plot.x_name}"
    return (
        f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(high: float) -> list[float]:
    """About four round numbers up to `high`."""
    step = 10.0 ** math.floor(math.log10(high / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if high / (step * factor) <= 5)
    return [step * count for count in range(int(high / step) + 1)]
