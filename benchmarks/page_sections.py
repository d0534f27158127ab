"""The sections of docs/benchmarks.md: each makes tables and drawings of one suite's results (`benchmarks.page`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import chart
from benchmarks.emulated import Measured
from benchmarks.regret import by_hand, rank_correlation, regret, timed
from benchmarks.regret_cells import CELLS, CHOSEN

_LIMITS = {cell.key: cell.limit_nbytes for cell in CELLS}


@dataclass(frozen=True, slots=True)
class Section:
    """lines: of Markdown. drawings: name -> SVG."""

    lines: tuple[str, ...] = ()
    drawings: dict[str, str] = field(default_factory=dict)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown; cells whose column holds only numbers go to the right."""
    listed = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    numbers = [
        bool(listed)
        and all(not row[i] or row[i].strip("*%x+-").replace(",", "").replace(".", "").isdigit() for row in listed)
        for i in range(len(header))
    ]
    rule = "|".join("---:" if right else "---" for right in numbers)
    return [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in listed)]


def _number(text: str) -> bool:
    return text.strip("*%x+-").replace(",", "").replace(".", "").isdigit()


def figure(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def plain(data: Mapping[str, Any]) -> Section:
    """Any result: its comparable figures, or the numbers of its rows."""
    rows = data.get("rows", data.get("comparable", {}))
    if isinstance(rows, Mapping) and rows and all(isinstance(row, Mapping) for row in rows.values()):
        rows = [{"": name, **row} for name, row in rows.items()]
    if isinstance(rows, Mapping):
        return Section(("", *table(("figure", "value"), [[name, figure(value)] for name, value in rows.items()])))
    if not rows:
        return Section()
    names = [n for n, v in rows[0].items() if isinstance(v, (int, float, str))]
    return Section(("", *table(names, [[figure(row.get(name, "")) for name in names] for row in rows])))


def regret_section(data: Mapping[str, Any]) -> Section:
    rows, points = [], {"chosen": [], "others": []}
    for key, fields in data["cells"].items():
        found = [_measured(m) for m in fields]
        runs = timed(found, _LIMITS.get(key))
        for m in found:
            if m.samples:
                points["chosen" if m.name == CHOSEN else "others"].append((m.predicted_seconds * 1e3, m.seconds * 1e3))
        mine = next(m for m in found if m.name == CHOSEN)
        if CHOSEN not in runs:
            rows.append([key, mine.degrees, mine.error or "over the limit", "", "", "", "", ""])
            continue
        best, hand = min(runs.values(), key=lambda m: m.seconds), by_hand(runs)
        order = rank_correlation(found)
        rows.append(
            [key, f"{mine.degrees}; {mine.stages}", _ms(mine.predicted_seconds), _ms(mine.seconds),
             f"{best.name}, {_ms(best.seconds)}", "" if hand is None else f"{mine.seconds / hand.seconds:.2f}",
             f"{regret(runs):.2f}", "" if order is None else f"{order:.2f}"]
        )  # fmt: skip
    header = ("cell", "chosen", "predicted ms", "measured ms", "fastest, ms", "to best by hand", "regret", "Spearman")
    lines = ["", *table(("figure", "value"), [[n, figure(v)] for n, v in data.get("comparable", {}).items()])]
    lines += ["", *table(header, rows), "", "What is fastest under which links, and what was chosen:", ""]
    crossings = [
        [c["job"], c["links"], c["fastest"], c["chosen"], f"{c['faster_than_single']:.2f}x"] for c in data["crossovers"]
    ]
    lines += table(("job", "links", "fastest measured", "chosen", "faster than one device"), crossings)
    drawing = chart.scatter("Steps of plans, ms", "predicted", "measured", {n: p for n, p in points.items() if p})
    return Section(tuple(lines), {"regret": drawing})


def prediction_section(data: Mapping[str, Any]) -> Section:
    rows, points = [], {}
    for cell in data["cells"]:
        m = _measured(cell["measured"])
        if m.error:
            rows.append([cell["key"], m.error, "", "", ""])
            continue
        points.setdefault(cell["key"].split(" ")[0], []).append((m.predicted_seconds * 1e3, m.seconds * 1e3))
        pairs = [(p, n) for p, n in zip(m.predicted_nbytes, m.nbytes) if n]
        worst = max((p / n - 1.0 for p, n in pairs), key=abs, default=None)
        off = f"{m.predicted_seconds / m.seconds - 1:+.1%}"
        rows.append(
            [cell["key"], _ms(m.predicted_seconds), _ms(m.seconds), off, "" if worst is None else f"{worst:+.1%}"]
        )
    header = ("cell", "predicted ms", "measured ms", "off by", "peak memory off by")
    drawings = {"prediction": chart.scatter("Steps of plans, ms", "predicted", "measured", points)} if points else {}
    return Section(("", *table(header, rows)), drawings)


def peers_section(data: Mapping[str, Any]) -> Section:
    ours = data["rows"][0]["seconds"]
    rows = [
        [r["name"], _ms(r["seconds"]), f"{r['seconds'] / ours:.2f}", f"{r['setup_seconds']:.1f}",
         f"{r['peak_nbytes'] / 2**20:.0f}", str(r["lines"]), r["decides"], r["cannot"]]
        for r in data["rows"]
    ]  # fmt: skip
    header = ("", "step ms", "to ours", "set-up CPU s", "peak MiB", "lines", "a person decides", "cannot")
    lines = ["", f"Two ranks, {data['links']}; the plan that was chosen: {data['plan']}.", "", *table(header, rows)]
    if data.get("published"):
        others = [
            [p["what"], f"{p['theirs_seconds']:g}", p["parts"], p["source"], f"{p[p['ours']]:.3g}",
             p["ours"].replace("_", " "), p["plan"]]
            for p in data["published"]
        ]  # fmt: skip
        header = ("published", "theirs s", "of it", "source", "ours s", "which is", "plan")
        lines += ["", "What others published, beside ours for the same job (theirs was measured on their GPUs, ours is "
                  "of this machine's processor or predicted):", "", *table(header, others)]  # fmt: skip
    values = {r["name"]: r["seconds"] * 1e3 for r in data["rows"]}
    return Section(tuple(lines), {"peers": chart.bars("A training step", "ms", values)})


def overhead_section(data: Mapping[str, Any]) -> Section:
    rows = [
        [r["group"], r["against"], f"{r['ours_ms']:.1f}", f"{r['theirs_ms']:.1f}", f"{r['ratio']:.3f}", r["verdict"]]
        for r in data["rows"]
    ]
    lines = ["", *table(("group", "against", "ours ms", "theirs ms", "ratio", ""), rows)]
    micros = [[name, f"{value:.1f}"] for name, value in data.get("microseconds", {}).items()]
    return Section((*lines, "", *table(("piece", "microseconds"), micros)))


def overlap_section(data: Mapping[str, Any]) -> Section:
    import statistics

    rows = [[name, _ms(statistics.median(values))] for name, values in data["samples"].items()]
    text = f"{data['job']}: {data['nbytes'] / 1e6:.1f} MB of gradients, link {data['rate_mbit']} Mbit/s, "
    text += f"step over max(compute, sums): {data['ratio']:.3f}."
    return Section(("", text, "", *table(("", "ms"), rows)))


def search_section(data: Mapping[str, Any]) -> Section:
    rows = [
        [name, f"{r['trace']:.1f}", f"{r['solve']:.1f}", f"{r['peak'] / 2**30:.2f}", r["plan"], f"{r['step']:.3f}",
         f"{r['gap']:.2%}", r["outcome"]]
        for name, r in data.get("rows", data).items()
    ]  # fmt: skip
    header = ("model@devices", "trace CPU s", "solve CPU s", "GiB", "plan", "step s", "gap", "")
    return Section(("", *table(header, rows)))


def scaling_section(data: Mapping[str, Any]) -> Section:
    lines = ["", "Assumptions:", "", *(f"- {line}" for line in data["assumptions"]), ""]
    drawings, rows = {}, []
    for kind in ("strong", "weak"):
        curves = {}
        for name, parts in data["models"].items():
            points = parts[kind]
            if not points:
                continue
            first = points[0]["tokens_per_second"] / points[0]["devices"]
            curves[name] = [(p["devices"], 100 * p["tokens_per_second"] / p["devices"] / first) for p in points]
            rows += [
                [f"{name}, {kind}", f"{p['devices']:,}", str(p["batch"]), f"{p['step_seconds']:.2f}",
                 f"{p['tokens_per_second']:,.0f}", f"{e:.0f}%", f"{100 * p['mfu']:.1f}%", p["plan"]]
                for p, (_, e) in zip(points, curves[name], strict=True)
            ]  # fmt: skip
        title = f"{kind.capitalize()} scaling: tokens per second and device, % of the fewest devices"
        drawings[f"scaling_{kind}"] = chart.lines(title, "devices", "%", curves, log_x=True)
    header = ("", "devices", "batch", "step s", "tokens/s", "efficiency", "MFU", "plan")
    return Section((*lines, *table(header, rows)), drawings)


def _measured(fields: Mapping[str, Any]) -> Measured:
    return Measured(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


SECTIONS = {
    "regret": regret_section,
    "prediction": prediction_section,
    "peers": peers_section,
    "overhead": overhead_section,
    "overlap": overlap_section,
    "search": search_section,
    "scaling": scaling_section,
}
