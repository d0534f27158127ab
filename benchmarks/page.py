"""docs/benchmarks.md and its drawings, made of benchmarks/results/*.json: `python -m benchmarks --page`.

Nothing in it is typed by hand: sentences that explain a suite are the first paragraph of its module, reasons of missed
targets stand beside the targets in its code.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import page_sections, records
from benchmarks.page_sections import Section

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "benchmarks.md"
DRAWINGS = DOCS / "benchmarks"
_HERE = Path(__file__).parent
_FIRST = ("regret", "prediction", "overhead", "overlap", "peers", "search", "mixed", "expert_plans", "scaling", "gpu")
_APART = ("runs", "baseline")


def write(folder: Path = records.FOLDER, page: Path = PAGE, drawings: Path = DRAWINGS) -> None:
    """The page of the results in a folder; drawings of an earlier page go."""
    found = {path.stem: records.read(path) for path in sorted(folder.glob("*.json"))}
    runs = found.get("runs", {}).get("runs", {})
    results = {name: found[name] for name in (*_FIRST, *sorted(found)) if name in found and name not in _APART}
    sections: dict[str, Section] = {}
    for name, data in results.items():
        make: Callable[[Mapping[str, Any]], Section] = page_sections.SECTIONS.get(name, page_sections.plain)
        sections[name] = make(data)
    drawings.mkdir(parents=True, exist_ok=True)
    for old in drawings.glob("*.svg"):
        old.unlink()
    for section in sections.values():
        for name, text in section.drawings.items():
            (drawings / f"{name}.svg").write_text(text)
    page.write_text("\n".join(_lines(results, sections, runs, drawings.name)).rstrip() + "\n")


def _lines(
    results: Mapping[str, Mapping[str, Any]], sections: Mapping[str, Section], runs: Mapping[str, Any], folder: str
) -> Iterable[str]:
    yield "# Benchmarks"
    yield ""
    yield "Made by `python -m benchmarks --page` from `benchmarks/results/*.json`. How everything is timed:"
    yield ""
    yield from _protocol()
    yield ""
    yield "## Where and when"
    yield ""
    header = ("suite", "date", "commit", "machine", "torch", "load", "minutes")
    rows = []
    for name, data in results.items():
        where = data.get("machine", {})
        machine = " ".join(str(where[k]) for k in ("cores", "processor", "device") if where.get(k))
        minutes = f"{runs[name]['seconds'] / 60:.1f}" if name in runs else ""
        parts = [str(where.get(key, "")) for key in ("date", "commit")]
        rows.append(
            [f"[{name}](#{name})", *parts, machine, str(where.get("torch", "")), str(where.get("load", "")), minutes]
        )
    yield from page_sections.table(header, rows)
    yield ""
    yield "## Targets"
    yield ""
    checked = [(name, target) for name, data in results.items() for target in data.get("targets", ())]
    met = sum(target["met"] for _, target in checked)
    yield f"{met} of {len(checked)} are met."
    yield ""
    yield from page_sections.table(
        ("suite", "figure", "wanted", "is", ""),
        [
            [name, t["name"], t["wanted"], page_sections.figure(t["value"]), "" if t["met"] else "**missed**"]
            for name, t in checked
        ],
    )
    missed = [(name, target) for name, target in checked if not target["met"]]
    if missed:
        yield ""
        yield "Why targets are missed:"
        yield ""
        for name, target in missed:
            yield f"- {name}, {target['name']}: {target.get('why') or 'the cause is not known yet.'}"
    for name, section in sections.items():
        yield ""
        yield f"## {name}"
        yield ""
        yield _summary(name)
        for drawing in section.drawings:
            yield ""
            yield f"![{drawing}]({folder}/{drawing}.svg)"
        yield from section.lines


def _protocol() -> Sequence[str]:
    """The list in the docstring of `benchmarks.protocol`, constants filled in."""
    from benchmarks import protocol

    text = (protocol.__doc__ or "").partition("\n\n")[2].strip()
    values = {"WARM_UPS": protocol.WARM_UPS, "TRIAL": protocol.TRIAL, "GIVE_UP": protocol.GIVE_UP}
    for name, value in {**values, "TIE": f"{protocol.TIE:.0%}"}.items():
        text = text.replace(f"`{name}`", str(value))
    return text.splitlines()


def _summary(name: str) -> str:
    """First paragraph of a suite's module."""
    for path in (_HERE / f"{name}.py", _HERE / name / "__main__.py", _HERE / name / "__init__.py"):
        if path.exists() and (text := ast.get_docstring(ast.parse(path.read_text()))):
            return " ".join(text.split("\n\n")[0].split())
    return ""
