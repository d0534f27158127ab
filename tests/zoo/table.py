"""docs/zoo.md from the rows: what is supported, in numbers; nothing by hand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

Row = dict[str, Any]

INTRODUCTION = """# The zoo

Every architecture here is built tiny from its config (no downloads), traced, planned by the search, rewritten, and run
on simulated ranks; its loss, every gradient and every buffer are compared with the unsplit model on the global batch.
This page is written by `make zoo`.

- **trace**: `export`, or `make_fx`, which bakes in the branches that the example batch takes; *leaf*: with submodules
  that are kept whole, because they cannot be traced.
- **dp2, tp2, pp2, mix**: these degrees are forced (the mix is dp2 x tp2, tp2 x pp2 or dp2 x pp2 in turn, on four
  ranks). Pipelines run two microbatches where that is exact; (m1) marks those that cannot. Communication is priced at
  nearly nothing here, so that all is split that a plan can split: the hardest test of the rewrite.
- **own**: what the planner chooses for four CPU ranks at realistic prices; most models this small stay on one device.
- **split**: share of the forward's matrix-product operations (products, convolutions, attention, grouped products,
  counted on the global shapes) that the tp2 plan halves on every rank. It says what *can* be split; a plan splits less
  where that is faster.
- A number is the largest relative error, of loss, gradients and buffers; `fail` is explained below the table.
"""


def document(rows: Sequence[Row]) -> str:
    """The page. rows: in the order of the zoo."""
    parts = [
        INTRODUCTION,
        _totals(rows),
        "| model | family | trace | s | nodes | split | dp2 | tp2 | pp2 | mix | own |",
    ]
    parts[-1] += "\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n" + "\n".join(map(_line, rows))
    for title, lines in (
        ("What each model is", [f"- `{r['name']}`: {r['summary']}" for r in rows if r["summary"]]),
        ("Kept whole", [f"- `{r['name']}`: {_plain(leaf)}" for r in rows for leaf in r["leaves"]]),
        ("One microbatch only", [f"- `{r['name']}`: {_plain(r['microbatches'])}" for r in rows if r["microbatches"]]),
        ("Transformers of which tp2 splits less than 95 %", [_whole(r) for r in rows if _below(r)]),
        ("Failures", [line for r in rows for line in _failures(r)]),
    ):
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _totals(rows: Sequence[Row]) -> str:
    commits = Counter(r.get("commit") or "unrecorded" for r in rows)
    where = ", ".join(f"`{name}` ({count})" for name, count in commits.most_common())
    traced = [r for r in rows if r["traced"] != "no"]
    lines = [
        f"{len(rows)} architectures, {datetime.now(UTC):%Y-%m-%d}, rows from commits {where}. "
        f"Traced {len(traced)} ({sum(bool(r['leaves']) for r in rows)} with opaque leaves), "
        f"median {median(r['trace_seconds'] for r in traced):.1f} s.",
        "",
        "| | passed | of |",
        "|---|--:|--:|",
    ]
    for column in ("dp2", "tp2", "pp2", "mix", "own"):
        lines.append(f"| {column} | {sum(_passed(r, column) for r in rows)} | {len(rows)} |")
    everywhere = sum(r["traced"] != "no" and all(_passed(r, c) for c in r["columns"]) for r in rows)
    lines.append(f"| every column | {everywhere} | {len(rows)} |")
    transformers = [r for r in rows if r["transformer"] and r["share"] is not None]
    lines.append(
        f"| transformers of which tp2 splits 95 % | {sum(not _below(r) for r in transformers)} | {len(transformers)} |"
    )
    return "\n".join(lines)


def _passed(row: Row, column: str) -> bool:
    return bool(row["columns"].get(column, {}).get("passed"))


def _below(row: Row) -> bool:
    return bool(row["transformer"]) and row["share"] is not None and row["share"] < 0.95


def _line(row: Row) -> str:
    trace = row["traced"] + (", leaf" if row["leaves"] else "")
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    cells = [_cell(row["columns"].get(column)) for column in ("dp2", "tp2", "pp2", "mix", "own")]
    seconds, nodes = (f"{row['trace_seconds']:.1f}", row["nodes"]) if row["traced"] != "no" else ("", "")
    return f"| {row['name']} | {row['family']} | {trace} | {seconds} | {nodes} | {share} | {' | '.join(cells)} |"


def _cell(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return ""
    if not outcome["passed"]:
        return "fail"
    mark = " (m1)" if "pp" in outcome["what"] and "microbatches" not in outcome["what"] else ""
    return f"{outcome['error']:.0e}{mark}"


def _whole(row: Row) -> str:
    ops = ", ".join(f"`{name}` {share:.0%}" for name, share in row["whole"])
    return f"- `{row['name']}` {row['share']:.0%}; whole: {ops}"


def _failures(row: Row) -> list[str]:
    if row["traced"] == "no":
        return [f"- `{row['name']}` is not traced: {_plain(row['problem'])}"]
    return [
        f"- `{row['name']}` {name}{' (' + c['what'] + ')' if c['what'] else ''}: {_plain(c['problem'])}"
        for name, c in row["columns"].items()
        if not c["passed"]
    ]


def _plain(text: str) -> str:
    """Without the folders of this machine, and without what Markdown would take for its own."""
    words = [re.sub(r"^/.*(site-packages|(?=/tests))/", "", word) for word in text.split()]
    return " ".join(words).replace("|", ";").replace("<", "\\<").replace("*", "\\*")
