"""docs/api.md, made from the docstrings of everything public.

python -m tests.api_page
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import shardplan as sp
from shardplan.model_state import ModelState
from shardplan.planner.report.measured import Measured
from shardplan.serving import Server

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
GROUPS = (
    ("Planning and running", ("auto_parallel", "plan", "meta_model", "Rows")),
    ("A running model", ("ParallelModel",)),
    ("A plan", ("Plan",)),
    ("Devices", ("Cluster",)),
    (
        "Constraints",
        ("pin", "split", "replicate", "together", "leaf", "degrees", "within_node", "memory", "zero"),
    ),
    ("Extending", ("rule",)),
    ("Errors", ("ShardplanError",)),
)
OTHERS = (("What `measure` gives", Measured), ("What `engine` gives", Server))
_HEAD = """# API reference

Made from the docstrings by `python -m tests.api_page`. `import shardplan as sp`; everything here is `sp.NAME`.
"""


def page() -> str:
    """The whole text."""
    missing = set(sp.__all__) - {name for _, names in GROUPS for name in names}
    assert not missing, f"docs/api.md lacks {sorted(missing)}"
    parts = [_HEAD]
    for title, names in GROUPS:
        parts.append(f"## {title}\n")
        for name in names:
            parts += _entry(name, getattr(sp, name))
    for title, kind in OTHERS:
        parts += [f"## {title}\n", *_entry(kind.__name__, kind)]
    return "\n".join(parts)


def _entry(name: str, value: Any) -> Iterable[str]:
    if not inspect.isclass(value):
        yield f"### {name}\n\n{_signature(name, value)}\n{_doc(value)}\n"
        return
    yield f"### {name}\n\n{_doc(value)}\n"
    members = {**vars(ModelState), **vars(value)} if issubclass(value, ModelState) else vars(value)
    for member, found in members.items():
        function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        if member.startswith("_") or issubclass(value, Exception) or not _doc(function):
            continue
        if isinstance(function, property):
            yield f"**`.{member}`** {_doc(function)}\n"
        elif inspect.isfunction(function):
            call = f"{name}.{member}" if function is not found else f".{member}"
            yield f"{_signature(call, function)}\n{_doc(function)}\n"


def _signature(name: str, function: Any) -> str:
    given = inspect.signature(function)
    parameters = [p for p in given.parameters.values() if p.name != "self"]
    returns = "" if given.return_annotation in (inspect.Signature.empty, "None") else f" -> {given.return_annotation}"
    text = f"{name}{given.replace(parameters=parameters, return_annotation=inspect.Signature.empty)}{returns}"
    if len(text) > 110:
        lines, stars = [], False
        for parameter in parameters:
            stars |= parameter.kind is parameter.VAR_POSITIONAL
            if parameter.kind is parameter.KEYWORD_ONLY and not stars:
                lines.append("    *,")
                stars = True
            lines.append(f"    {parameter},")
        text = "\n".join([f"{name}(", *lines, f"){returns}"])
    # Annotations are text here, and print in quotes.
    return "```text\n" + re.sub(r"(: )'([^'\n]*)'(?= =|,|\)|$)", r"\1\2", text) + "\n```\n"


def _doc(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "").strip()


def main() -> None:
    PAGE.write_text(page())
    print(f"{PAGE.name}: {len(page().splitlines())} lines")


if __name__ == "__main__":
    main()
