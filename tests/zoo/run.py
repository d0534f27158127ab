"""Run the zoo: ``python -m tests.zoo.run`` (two processes, resumes), then write docs/zoo.md.

``--only NAME`` (may be repeated; globs) and ``--columns tp2`` for one architecture in this process, with the traceback
and the operations that stay whole. ``--fresh`` forgets earlier rows, ``--failed`` runs those again that failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "out" / "zoo.jsonl"
TABLE = ROOT / "docs" / "zoo.md"
LIMIT_SECONDS = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], help="names, globs or families")
    parser.add_argument("--columns", default="", help="comma-separated: dp2,tp2,pp2,mix,own")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--failed", action="store_true", help="run failed rows again")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="in this process; nothing is written")
    options = parser.parse_args(arguments)
    from tests.zoo.registry import zoo

    entries = zoo()
    unwanted = [n for n, e in entries.items() if options.only and not _matches(n, e.family, options.only)]
    wanted = [n for n in entries if n not in unwanted]
    if not wanted:
        parser.error(f"nothing is called {', '.join(options.only)}")
    if options.here or options.columns:
        return _here(wanted, tuple(filter(None, options.columns.split(","))))
    rows = {} if options.fresh and not options.only else read_rows()
    again = {n for n in wanted if options.only or (options.failed and n in rows and not passed(rows[n]))}
    todo = [(n, list(entries).index(n) % 3) for n in wanted if n not in rows or n in again]
    ROWS.parent.mkdir(exist_ok=True)
    if options.fresh and not options.only:
        ROWS.write_text("")
    commit = _commit()
    for row in _work(todo, options.workers):
        row["commit"] = commit
        rows[row["name"]] = row
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)
    ordered = [rows[n] for n in entries if n in rows]
    if len(ordered) == len(entries):
        from tests.zoo.table import document

        TABLE.write_text(document(ordered))
        print(f"wrote {TABLE.relative_to(ROOT)}")
    good = sum(map(passed, ordered))
    print(f"{good} of {len(ordered)} pass")
    return 0 if good == len(ordered) else 1


def read_rows() -> dict[str, dict[str, Any]]:
    """The latest row of every entry, by name."""
    if not ROWS.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, ROWS.read_text().splitlines())}


def passed(row: dict[str, Any]) -> bool:
    """Traced, and every column equal to one device."""
    return row["traced"] != "no" and all(column["passed"] for column in row["columns"].values())


def line(row: dict[str, Any]) -> str:
    """A row for the terminal: what failed, in words."""
    if row["traced"] == "no":
        return f"{row['name']}: not traced: {row['problem']}"
    share = "" if row["share"] is None else f", tp2 splits {row['share']:.1%}"
    bad = [f"\n    {name} ({c['what']}): {c['problem']}" for name, c in row["columns"].items() if not c["passed"]]
    return f"{row['name']}: {row['nodes']} nodes, {row['seconds']:.0f} s{share}{''.join(bad) or ', equal everywhere'}"


def _commit() -> str:
    """Short name of the commit that is checked out, with a star where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=*", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _matches(name: str, family: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) or family == glob for glob in globs)


def _here(names: Sequence[str], columns: tuple[str, ...]) -> int:
    from tests.zoo.check import COLUMNS, check
    from tests.zoo.registry import zoo

    entries, good = zoo(), True
    for name in names:
        row = check(entries[name], columns or COLUMNS, list(entries).index(name) % 3, trouble=print).as_dict()
        print(line(json.loads(json.dumps(row))), flush=True)
        for op, part in row["whole"]:  # type: ignore[union-attr]
            print(f"    whole: {op} {part:.1%}")
        if row["microbatches"]:
            print(f"    one microbatch: {row['microbatches']}")
        good &= passed(json.loads(json.dumps(row)))
    return 0 if good else 1


# -- workers -----------------------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """Body of a worker process: checks entries until told None."""
    import warnings

    import torch

    from tests.zoo.check import COLUMNS, check
    from tests.zoo.registry import zoo

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entries = zoo()
    while (task := connection.recv()) is not None:
        name, mix = task
        connection.send(json.dumps(check(entries[name], COLUMNS, mix).as_dict()))


def _work(todo: Sequence[tuple[str, int]], workers: int) -> Iterator[dict[str, Any]]:
    """Rows as they come. A worker that dies or exceeds the limit is replaced, and its entry gets a row that says so."""
    context = multiprocessing.get_context("spawn")
    waiting, busy = list(reversed(todo)), {}

    def start(process: Any = None, ours: Any = None) -> None:
        if not waiting:
            if ours is not None:
                ours.send(None)
            return
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
        task = waiting.pop()
        ours.send(task)
        busy[ours] = process, task[0], time.monotonic()

    for _ in range(min(workers, len(todo))):
        start()
    while busy:
        ready = wait(list(busy), 1.0)
        for ours in list(busy):
            process, name, began = busy[ours]
            if ours in ready:
                del busy[ours]
                try:
                    row = json.loads(ours.recv())
                except EOFError:
                    process.join()
                    yield _lost(name, f"the process ended with status {process.exitcode}")
                    start()
                    continue
                start(process, ours)
                yield row
            elif time.monotonic() - began > LIMIT_SECONDS:
                del busy[ours]
                process.kill()
                process.join()
                yield _lost(name, f"no answer within {LIMIT_SECONDS:.0f} s")
                start()


def _lost(name: str, problem: str) -> dict[str, Any]:
    from tests.zoo.check import Row
    from tests.zoo.registry import zoo

    entry = zoo()[name]
    return Row(name, entry.family, entry.summary, entry.transformer, problem=problem).as_dict()


if __name__ == "__main__":
    sys.exit(main())
