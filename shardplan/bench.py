"""``shardplan bench``: the benchmarks of a checkout, by name, under one roof.

Benchmarks are not part of the installed package: they need the repository beside it. Each is a module of ``benchmarks``
with a command line of its own; the first paragraph of its docstring is what ``shardplan bench`` lists.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shardplan.errors import UsageError

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def benchmarks(folder: Path = FOLDER) -> dict[str, str]:
    """Name -> what it measures, of every module that has a command line. Raises UsageError without a checkout."""
    if not folder.is_dir():
        raise UsageError(
            "the benchmarks are not here", [f"looked in {folder}"], ["run it in a checkout of the repository"]
        )
    found = {}
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__main__.py")]):
        text = path.read_text()
        summary = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        if '__name__ == "__main__"' in text and summary and path != folder / "__main__.py":
            found[path.parent.name if path.stem == "__main__" else path.stem] = " ".join(summary.split())
    return found


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs one with its own arguments; -> its exit status. Raises UsageError for an unknown name."""
    known = benchmarks()
    if name not in known:
        raise UsageError(f"there is no benchmark {name!r}", [f"there are {', '.join(known)}"])
    paths = [str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], env=environment).returncode
