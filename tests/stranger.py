"""A stranger's first ten minutes: a fresh clone of this checkout's HEAD and a fresh virtual environment, then every
command and file under "Start here" of the README, word by word.

    python tests/stranger.py [--keep FOLDER] [--no-cache]

Says how long each command took and what it printed last. Ends with 7 where one fails, where a report that should be
there cannot be opened, or where all of it takes more than ten minutes. Needs only Python: what the README asks for.
--no-cache: without pip's cache, as on a machine that never installed anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTION = "## Start here"
LIMIT_SECONDS = 600.0
REPORTS = ("out/report.html", "report.html", "planned.html")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def steps(readme: str) -> list[tuple[str, str]]:
    """(file or "", text) of the blocks of the section, in order; a block after "`name`:" is that file."""
    section = readme.split(SECTION, 1)[1].split("\n## ", 1)[0]
    found = []
    pattern = re.compile(r"(?:`([\w./]+)`:\s*\n\n)?```\w*\n(.*?)```", re.DOTALL)
    for name, text in pattern.findall(section):
        found.append((name, text))
    return found


def opened(page: Path) -> str:
    """What is wrong with a report; empty where a browser (or, without one, this script) finds its verdict."""
    if not page.exists():
        return "was not written"
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    text = page.read_text()
    if program is not None:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
        text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return "" if "a step" in text and 'class="verdict"' in text else "has no verdict"


def run(command: str, folder: Path, before: str, environment: dict[str, str]) -> tuple[int, float, str]:
    """Status, seconds and last lines of a command line in a shell in which the earlier `before` was typed."""
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", f"{before}\n{command}"], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, time.monotonic() - started, "\n".join(done.stdout.splitlines()[-6:])


def main() -> int:
    parser = argparse.ArgumentParser(description="README's first steps in a fresh clone and environment.")
    parser.add_argument("--keep", type=Path, help="where the clone goes, and stays")
    parser.add_argument("--no-cache", action="store_true")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="shardplan-stranger-"))
    folder.mkdir(parents=True, exist_ok=True)
    clone = folder.resolve() / "checkout"
    drop = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment |= {"SHARDPLAN_CACHE": str(folder / "cache")} | ({"PIP_NO_CACHE_DIR": "1"} if options.no_cache else {})
    failures, total, before = 0, 0.0, ""
    try:
        status, seconds, tail = run(f"git clone --quiet {ROOT} {clone}", folder, "", environment)
        print(f"{seconds:6.1f} s  git clone")
        if status:
            print(tail)
            return 7
        for name, text in steps((clone / "README.md").read_text()):
            if name:
                (clone / name).write_text(text)
                print(f"          wrote {name}")
                continue
            for command in filter(None, (line.split("  #")[0].strip() for line in text.splitlines())):
                if command.startswith(". "):
                    before = command
                    continue
                status, seconds, tail = run(command, clone, before, environment)
                total += seconds
                print(f"{seconds:6.1f} s  {command}" + (f" ended with {status}" if status else ""), flush=True)
                print("\n".join(f"          | {line}" for line in tail.splitlines()[-3:]), flush=True)
                # doctor ends with 7 where it found a problem, which is an answer
                failures += status != 0 and not (command == "shardplan doctor" and status == 7)
        for name in REPORTS:
            if wrong := opened(clone / name):
                failures += 1
                print(f"{name} {wrong}")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    met = not failures and total <= LIMIT_SECONDS
    print(
        f"{total:6.1f} s in all, wanted at most {LIMIT_SECONDS:.0f} s; {failures} failed: {'met' if met else 'missed'}"
    )
    return 0 if met else 7


if __name__ == "__main__":
    sys.exit(main())
