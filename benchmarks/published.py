"""How well `shardplan simulate` predicts published training throughput, and the fit of its constants.

    python benchmarks/published.py            # predicted against published, row by row, and errors of both sets
    python benchmarks/published.py --summary  # only the errors, per source
    python benchmarks/published.py --fit      # fit the constants to the sources of the fit set, print them
    python benchmarks/published.py --docs     # write the errors into docs/simulate.md

Each file in ``benchmarks/published`` is one source: ``columns`` and ``rows`` of the table, ``common`` fields,
``models`` by name, and whether constants may be fitted to it (``set``); a source is in one set as a whole. ``kin``: the
source of the fit set that the same people published of the same system. The published column is one of `PUBLISHED`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shardplan.planner.analytic.constants import DEFAULT, Architecture, Constants
from shardplan.planner.analytic.predict import Prediction, predict
from shardplan.planner.analytic.row import Row, read_row

FOLDER = Path(__file__).parent / "published"
DOCS = Path(__file__).parent.parent / "docs" / "simulate.md"
BEGIN, END = "<!-- errors: made by benchmarks/published.py --docs -->", "<!-- end of errors -->"
PUBLISHED = (
    "step_seconds",
    "tokens_per_second_per_device",
    "tflops_per_device",
    "hardware_tflops_per_device",
    "peak_memory_gb",
)
_MORE_IS_SLOWER = ("step_seconds", "peak_memory_gb")


@dataclass(frozen=True)
class Case:
    """One published figure. what: the column it is in; value: the figure. kin: see module docstring, else empty."""

    source: str
    set: str
    kin: str
    row: Row
    what: str
    value: float

    def error(self, constants: Constants = DEFAULT) -> float:
        """log(predicted / published seconds or bytes)."""
        ratio = value_of(predict(self.row, None, constants), self) / self.value
        return math.log(ratio if self.what in _MORE_IS_SLOWER else 1 / ratio)


def value_of(found: Prediction, case: Case) -> float:
    """The prediction in the unit of the published column."""
    if case.what == "tokens_per_second_per_device":
        assert found.tokens_per_second is not None
        return found.tokens_per_second / case.row.ranks
    if case.what == "peak_memory_gb":
        assert found.peak_memory_nbytes is not None
        return max(found.peak_memory_nbytes) / 1e9
    value = getattr(found, case.what)
    assert value is not None
    return value


def load(folder: Path = FOLDER) -> list[Case]:
    """Every figure of every source."""
    return [case for path in sorted(folder.glob("*.toml")) for case in _cases(path)]


def _cases(path: Path) -> Iterable[Case]:
    data = tomllib.loads(path.read_text())
    for index, values in enumerate(data["rows"]):
        given: dict[str, Any] = {"id": f"{path.stem} {index + 1}", **data.get("common", {})}
        listed = dict(zip(data["columns"], values, strict=True))
        if (model := listed.pop("model", None)) is not None:
            given |= data["models"][model] | {"id": f"{model} {index + 1}"}
        given |= listed
        what = next(name for name in PUBLISHED if name in given)
        value = float(given.pop(what))
        kind, gpus = given.pop("kind", None), given.pop("gpus", None)
        split = math.prod(given.get(name, 1) for name in ("tp", "pp", "cp"))
        if gpus is not None:
            given["dp"] = gpus // split
        if kind is not None:
            given["devices"] = f"{split * given.get('dp', 1)}x{kind}"
        yield Case(path.stem, data["set"], data.get("kin", ""), read_row(given), what, value)


def show(cases: Sequence[Case], rows: bool) -> None:
    """Prints the errors per row and source, then of both sets."""
    if rows:
        for case in cases:
            found = value_of(predict(case.row), case)
            figures = f"{case.value:10.4g} {found:10.4g} {case.error():+7.1%}"
            print(f"{case.source:22} {case.row.id:28} {case.what:28} {figures}")
    print(f"{'set':9} {'source':24} {'rows':>4} {'median':>8} {'worst':>8} {'bias':>8}")
    for line in summary(cases):
        print(f"{line.set:9} {line.source:24} {line.rows:4} {line.median:8.1%} {line.worst:8.1%} {line.bias:+8.1%}")


@dataclass(frozen=True)
class Summary:
    """Relative errors of a source, or of a set as a whole (source "all"; "not kin": those without a kin).

    bias: of the seconds or bytes, on average; positive is predicted too long.
    """

    set: str
    source: str
    rows: int
    median: float
    worst: float
    bias: float


def summary(cases: Sequence[Case]) -> list[Summary]:
    """One line per source, then one per set."""
    errors: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        errors.setdefault((case.set, case.source), []).append(case.error())
    whole = {
        ("fit", "all"): [case for case in cases if case.set == "fit"],
        ("hold-out", "all"): [case for case in cases if case.set == "hold-out"],
        ("hold-out", "not kin"): [case for case in cases if case.set == "hold-out" and not case.kin],
    }
    errors = dict(sorted(errors.items())) | {key: [case.error() for case in group] for key, group in whole.items()}
    return [_summary(*key, group) for key, group in errors.items() if group]


def _summary(set_: str, source: str, errors: Sequence[float]) -> Summary:
    sizes = [abs(math.expm1(error)) for error in errors]
    bias = math.expm1(statistics.fmean(errors))
    return Summary(set_, source, len(errors), statistics.median(sizes), max(sizes), bias)


def documentation(cases: Sequence[Case], folder: Path = FOLDER) -> str:
    """The table of errors as Markdown, each source by its own words."""
    names = {path.stem: tomllib.loads(path.read_text()) for path in folder.glob("*.toml")}
    lines = ["| set | source | figures | median | worst | bias |", "|---|---|---:|---:|---:|---:|"]
    for line in summary(cases):
        known = names.get(line.source)
        source = f"[{known['source']}]({known['url'].split()[0]})" if known else f"**{line.source}**"
        lines.append(
            f"| {line.set} | {source} | {line.rows} | {line.median:.1%} | {line.worst:.1%} | {line.bias:+.1%} |"
        )
    return "\n".join(lines)


def write_documentation(text: str, path: Path = DOCS) -> None:
    """Puts the table between its marks in the page."""
    head, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


# -- fit --------------------------------------------------------------------------------------------------------------

_FITTED = {
    "ampere": ("math", "attention", "attention_backward", "half_seq", "eager"),
    "hopper": ("math", "math_fp8", "attention", "attention_backward", "half_seq", "eager"),
    "blackwell": ("math_fp8", "attention", "attention_backward"),
    "early": ("tp_overlap", "tp_overlap_backward", "pointwise_forward", "pointwise_backward", "step_seconds"),
    "fused": ("tp_overlap", "tp_overlap_backward", "dp_overlap", "pointwise_forward", "pointwise_backward"),
    "sharded": ("gather_slack", "pointwise_forward", "pointwise_backward", "step_seconds"),
}
_BOUNDS = {
    "math": (0.4, 0.9),
    "math_fp8": (0.3, 0.8),
    "attention": (0.2, 0.75),
    "attention_backward": (0.15, 0.65),
    "half_seq": (50, 3000),
    "eager": (0.1, 1.0),
    "tp_overlap": (0.0, 0.8),
    "tp_overlap_backward": (0.0, 0.9),
    "dp_overlap": (0.3, 1.0),
    "gather_slack": (0.0, 0.4),
    "pointwise_forward": (1.0, 2.5),
    "pointwise_backward": (1.0, 2.5),
    "step_seconds": (0.0, 0.2),
}


def fit(cases: Sequence[Case]) -> Constants:
    """Coordinate descent on the mean absolute log error, every source weighing as the root of its rows."""
    weights = {case.source: 1 / math.sqrt(sum(c.source == case.source for c in cases)) for case in cases}

    def loss(constants: Constants) -> float:
        total = sum(weights[case.source] * abs(case.error(constants)) for case in cases)
        return total / sum(weights[case.source] for case in cases)

    best, least = DEFAULT, loss(DEFAULT)
    step = 0.2
    while step > 0.01:
        before = least
        for group, names in _FITTED.items():
            for name in names:
                for factor in (1 + step, 1 / (1 + step)):
                    tried = _changed(best, group, name, factor)
                    found = loss(tried)
                    if found < least:
                        best, least = tried, found
        print(f"step {step:.3f} error {least:.4f}", flush=True)
        if before - least < 3e-4:
            step /= 2
    return best


def _changed(constants: Constants, group: str, name: str, factor: float) -> Constants:
    low, high = _BOUNDS[name]
    holder: Any = constants.architectures.get(group) or getattr(constants, group)
    value = getattr(holder, name)
    value = value * factor if value > 0.01 else 0.02 if factor > 1 else 0.0
    changed = replace(holder, **{name: min(max(value, low), high)})
    if isinstance(changed, Architecture):
        return replace(constants, architectures=constants.architectures | {group: changed})
    return replace(constants, **{group: changed})


def _text(holder: Any) -> str:
    values = ", ".join(
        f"{getattr(holder, f.name):.3g}" if f.type != "bool" else str(getattr(holder, f.name)) for f in fields(holder)
    )
    return f"{type(holder).__name__}({values})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    cases = load()
    if options.docs:
        write_documentation(documentation(cases))
        return
    if options.fit:
        found = fit([case for case in cases if case.set == "fit"])
        for name, arch in found.architectures.items():
            print(f'    "{name}": {_text(arch)},')
        for name in ("early", "fused", "sharded"):
            print(f"    {name}: System = {_text(getattr(found, name))}")
        return
    show(cases, not options.summary)


if __name__ == "__main__":
    main()
