"""The report as one HTML file: no network; a small script makes drawings answer, but nothing needs it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from shardplan.planner.plan import Plan
from shardplan.planner.report.blocks import (
    PARTS,
    Bars,
    Block,
    Chart,
    Curves,
    Lines,
    Map,
    Plot,
    Reasons,
    Section,
    Shares,
    Table,
    Topology,
)
from shardplan.planner.report.document import document
from shardplan.planner.report.drawings import curve_svg, map_table, plot_svg, share_svg, topology_svg, traffic_lines
from shardplan.planner.report.facts import Facts, facts
from shardplan.planner.report.measured import Measured
from shardplan.planner.report.script import SCRIPT
from shardplan.planner.report.style import STYLE
from shardplan.planner.report.svg import bar_svg, timeline_svg
from shardplan.planner.report.what_if import WhatIf
from shardplan.planner.report.words import nbytes_text, plural, ratio_text, seconds_text, share_text

_QUANTITY = re.compile(r"([-+]?[\d,.]+)\s*(\w*)")
_UNITS = {"ms": 1e-3, "us": 1e-6, "ns": 1e-9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
_BARS = {
    "forward": "forward",
    "backward": "backward",
    "weight": "gradients of weights",
    "reduce": "once a step",
    "optimizer": "optimizer",
    "transfer": "message",
    "wait": "waiting",
}
"""Colours of a timeline."""
_MOST_BARS = 64
_MOST_CURVES = 16
_MOST_ROWS = 400
_NAMES = ("parameter", "op")
_WORDS = ("why not", "and", "decision")


def render_html(plan: Plan, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()) -> str:
    """A whole HTML document."""
    found = facts(plan, measured, what_if)
    body = [
        f"<h1>{escape(plan.model or 'model')}: plan for {plural(len(plan.devices), 'device')}</h1>",
        f'<p class="verdict">{escape(found.verdict)}</p>',
        _figures(found),
        *(part for section in document(found) for part in _section(section)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(plan.model or 'model')} - shardplan</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def notebook(plan: Plan, measured: Measured | None = None) -> str:
    """The document in a frame, for a notebook's cell."""
    text = escape(render_html(plan, measured), quote=True)
    return f'<iframe srcdoc="{text}" style="width:100%;height:640px;border:1px solid #8884" title="plan"></iframe>'


def _figures(found: Facts) -> str:
    items = [("predicted step", seconds_text(found.step_seconds))]
    if found.measured:
        items.append(("measured step", seconds_text(found.measured.step_seconds)))
        if found.measured.single_device_seconds:
            ratio = found.measured.single_device_seconds / found.measured.step_seconds
            items.append(("speed of one device", ratio_text(ratio)))
    rate = found.tokens_per_second or found.samples_per_second
    if rate:
        items.append((f"{'tokens' if found.tokens_per_second else 'samples'} per second", f"{rate:,.0f}"))
    items.append(("bubble", share_text(found.simulation.bubble_share)))
    shares = [d.memory.peak_nbytes / d.limit_nbytes for d in found.devices if d.limit_nbytes]
    peak = max((device.memory.peak_nbytes for device in found.devices), default=0)
    items.append(("memory of the fullest device", share_text(max(shares))) if shares else ("peak", nbytes_text(peak)))
    if found.status.outcome != "given":
        items.append(("proven gap", share_text(max(found.status.gap, 0.0))))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="figures">{cells}</dl>'


def _section(section: Section) -> Iterable[str]:
    yield f"<section><h2>{escape(section.title)}</h2>"
    charts = [block for block in section.blocks if isinstance(block, Chart)]
    drawn = {event.category for chart in charts for track in chart.timeline.tracks for event in track.events}
    if charts:
        yield _key([name for name in _BARS if name in drawn], _BARS)
    plots = [block for block in section.blocks if isinstance(block, Plot)]
    if plots:
        drawn = (f"<figure><figcaption>{escape(plot.y_name)}</figcaption>{plot_svg(plot)}</figure>" for plot in plots)
        yield f'<div class="plots">{"".join(drawn)}</div>'
    for block in section.blocks:
        if not isinstance(block, Plot):
            yield from _block(block)
    yield "</section>"


def _block(block: Block) -> Iterable[str]:
    assert not isinstance(block, Plot)  # these stand side by side
    if isinstance(block, Lines):
        yield from (f"<p>{escape(item)}</p>" for item in block.items)
    elif isinstance(block, (Table, Reasons)):
        yield _table(block if isinstance(block, Table) else block.table)
    elif isinstance(block, Bars):
        yield _bars(block)
    elif isinstance(block, Shares):
        yield _shares(block)
    elif isinstance(block, Curves):
        yield _curves(block)
    elif isinstance(block, Topology):
        yield f'<div class="scroll" tabindex="0">{topology_svg(block)}</div>'
        yield from (f'<p class="dim">{escape(line)}</p>' for line in traffic_lines(block))
    elif isinstance(block, Map):
        yield map_table(block)
    elif drawing := timeline_svg(block.timeline, block.end_seconds):
        yield f'<p class="dim">{escape(block.timeline.name)}</p><div class="scroll" tabindex="0">{drawing}</div>'


def _key(classes: Iterable[str], names: dict[str, str]) -> str:
    items = "".join(f'<li><i class="{c}"></i>{escape(names.get(c, c))}</li>' for c in classes)
    return f'<ul class="key">{items}</ul>'


def _table(table: Table) -> str:
    head = "".join(f"<th{_class('', number)}>{escape(name)}</th>" for name, number in table.columns)
    rows = []
    sorts = len(table.rows) > 2
    for row in table.rows[:_MOST_ROWS]:
        cells = (
            f"<td{_class(name, number)}{_sort_key(cell) if sorts and number else ''}>{escape(cell)}</td>"
            for cell, (name, number) in zip(row, table.columns)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    left = len(table.rows) - _MOST_ROWS
    more = f'<p class="dim">and {plural(left, "row")} more, in the JSON report</p>' if left > 0 else ""
    whole = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table{" class=sorts" * sorts}>{whole}</table></div>{more}'


def _sort_key(cell: str) -> str:
    """What the script sorts a cell of numbers with units by."""
    found = _QUANTITY.search(cell)
    if not found:
        return ""
    return f' data-v="{float(found[1].replace(",", "")) * _UNITS.get(found[2], 1.0):g}"'


def _class(name: str, number: bool) -> str:
    if number:
        return ' class="n"'
    return ' class="name"' if name in _NAMES else ' class="wide"' if name in _WORDS else ""


def _shares(shares: Shares) -> str:
    rows = []
    for row in shares.rows[:_MOST_BARS]:
        head = f'<div class="head"><span>{escape(row.name)}</span><span>{escape(row.text)}</span></div>'
        rows.append(f"<div>{head}{share_svg(row, shares)}</div>")
    left = len(shares.rows) - _MOST_BARS
    more = f'<p class="dim">and {left} more, in the JSON report</p>' if left > 0 else ""
    key = _key((colour for colour, _ in shares.names), dict(shares.names))
    return f'{key}<div class="memory">{"".join(rows)}</div>{more}'


def _curves(curves: Curves) -> str:
    rows = []
    for curve in curves.curves[:_MOST_CURVES]:
        at, peak = curve.peak
        limit = f" of {nbytes_text(curve.limit_nbytes)}" if curve.limit_nbytes else ""
        text = f"{nbytes_text(peak)}{limit}, first at {seconds_text(at)}"
        head = f'<div class="head"><span>{escape(curve.name)}</span><span>{escape(text)}</span></div>'
        rows.append(f"<div>{head}{curve_svg(curve, curves)}</div>")
    left = len(curves.curves) - _MOST_CURVES
    more = f'<p class="dim">and {left} more</p>' if left > 0 else ""
    ends = f'<div class="head dim"><span>0</span><span>{seconds_text(curves.end_seconds)}</span></div>'
    return f'<div class="memory">{"".join(rows)}{ends}</div>{more}'


def _bars(bars: Bars) -> str:
    rows = []
    for bar in bars.bars[:_MOST_BARS]:
        over = ' class="over"' if 0 < bar.limit_nbytes < bar.nbytes else ""
        rows.append(
            f'<div><div class="head"><span>{escape(bar.name)}</span><span{over}>{escape(bar.text)}</span></div>'
            f'{bar_svg(bar, bars)}<div class="dim">{escape(bar.parts_text)}</div></div>'
        )
    left = len(bars.bars) - _MOST_BARS
    more = f'<p class="dim">and {left} more, in the JSON report</p>' if left > 0 else ""
    more += f'<p class="dim">{escape(bars.note)}</p>' if bars.note else ""
    classes = ["optimizer-part" if part == "optimizer" else part for part in PARTS]
    key = _key(classes, {"optimizer-part": "optimizer"})
    marks = '<li><i class="mark limit"></i>limit</li>'
    if any(bar.measured_nbytes is not None for bar in bars.bars):
        marks += '<li><i class="mark seen"></i>measured peak</li>'
    return key.replace("</ul>", f"{marks}</ul>") + f'<div class="memory">{"".join(rows)}</div>{more}'
