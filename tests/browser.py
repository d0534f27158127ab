"""The HTML report in a real browser: hovered, zoomed and dragged, at two widths, with and without scripts.

    python -m tests.browser [--keep FOLDER] [PLAN.json ...]

Needs chromium (or google-chrome) on the PATH; ends with status 2 where there is none. A copy of the page gets a driver
that plays the pointer and writes what it saw into the page, which the browser then prints. --keep: leave pages and
screenshots there, light, dark and as printed. PLAN.json: plan files whose reports are opened too.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shardplan.planner.plan import Plan
from shardplan.planner.report import WhatIf, render_html
from tests.report_plans import measured, pipeline_plan

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 390)
MOST_NBYTES = 500_000

DRIVER = """
<script>
var seen = {};
function at(shape, kind, x, more) {
  shape.dispatchEvent(new (kind === 'wheel' ? WheelEvent : PointerEvent)(kind,
    Object.assign({ bubbles: true, cancelable: true, clientX: x, clientY: 40 }, more || {})));
}
var svg = document.querySelector('svg.timeline');
var bar = Array.from(svg.querySelectorAll('rect')).filter(function (r) { return r.querySelector('title'); })[0];
at(bar, 'pointermove', 60);
seen.tip = document.querySelector('.tip').textContent;
seen.shown = getComputedStyle(document.querySelector('.tip')).display;
at(document.body, 'pointermove', 60);
seen.hidden = getComputedStyle(document.querySelector('.tip')).display;
var before = +bar.getAttribute('width');
document.querySelector('.zoom button').click();
seen.zoomed = +bar.getAttribute('width') / before;
var box = svg.getBoundingClientRect();
at(svg, 'wheel', box.left + box.width / 2, { deltaY: -1, ctrlKey: true });
seen.wheeled = +bar.getAttribute('width') / before;
var place = +bar.getAttribute('x');
at(svg, 'pointerdown', box.left + box.width / 2);
at(svg, 'pointermove', box.left + box.width / 2 + 50);
at(svg, 'pointerup', box.left + box.width / 2 + 50);
seen.dragged = +bar.getAttribute('x') - place;
seen.zooms = Array.from(document.querySelectorAll('svg.timeline')).map(function (s) { return s.dataset.zoom; });
document.querySelectorAll('.zoom button')[2].click();
seen.back = +bar.getAttribute('width') / before;
var point = document.querySelector('svg.plot circle');
if (point) {
  at(point, 'pointermove', 60);
  seen.point = document.querySelector('.tip').textContent;
}
seen.sorted = true;
document.querySelectorAll('table.sorts').forEach(function (table) {
  Array.from(table.tHead.rows[0].cells).forEach(function (head, column) {
    head.querySelector('button').click();
    var values = Array.from(table.tBodies[0].rows).map(function (row) { return row.cells[column].dataset.v; });
    if (values[0] === undefined) return;
    for (var i = 1; i < values.length; i++) if (+(values[i - 1] || -1) > +(values[i] || -1)) seen.sorted = false;
  });
});
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
var cut = [];
document.querySelectorAll('p, h1, h2, dd, dt, td, th').forEach(function (e) {
  if (!e.closest('.scroll') && e.scrollWidth > e.clientWidth + 1) cut.push(e.textContent.slice(0, 60));
});
seen.cut = cut;
var result = document.createElement('pre');
result.id = 'seen';
result.textContent = JSON.stringify(seen);
document.body.appendChild(result);
</script>
"""


def browser() -> str | None:
    """The program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def drive(program: str, page: Path, width: int, flags: tuple[str, ...] = ()) -> str:
    """The document as the browser has it after its scripts ran."""
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},6000", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def wrong(seen: dict, width: int) -> list[str]:
    """What is not as it should be."""
    found = []
    if not re.match(r"\d+F\d+, ", seen["tip"]) or seen["shown"] != "block" or seen["hidden"] != "none":
        found.append(f"a bar under the pointer says {seen['tip']!r} ({seen['shown']}, then {seen['hidden']})")
    if abs(seen["zoomed"] - 2) > 0.01 or seen["wheeled"] < 2.5 or abs(seen["back"] - 1) > 0.01:
        found.append(f"zoom: {seen['zoomed']}, by wheel {seen['wheeled']}, back {seen['back']}")
    if seen["dragged"] <= 0:
        found.append(f"dragging moved bars by {seen['dragged']}")
    if len(set(seen["zooms"])) > 1:
        found.append(f"timelines on one scale are zoomed apart: {seen['zooms']}")
    if "samples/s" not in seen.get("point", "samples/s"):
        found.append(f"a point under the pointer says {seen['point']!r}")
    if not seen["sorted"]:
        found.append("a table is not sorted by a click on its heading")
    if seen["wide"] > 0:
        found.append(f"the page is {seen['wide']} px wider than a window of {width}")
    if seen["cut"]:
        found.append(f"cut text: {seen['cut']}")
    return found


def pages(files: Sequence[Path]) -> dict[str, str]:
    """Name -> page."""
    small, deep, one = pipeline_plan(), pipeline_plan(8, 8, 64, 80), pipeline_plan(1, 1, 1, 4)
    rates = ((1, 20.0), (2, 38.0), (8, 120.0))
    others = tuple(WhatIf("devices", str(n), f"dp{n}", 8 / rate, rate, 9 << 30, devices=n) for n, rate in rates)
    others += tuple(WhatIf("links", f"{n}x", "dp4", 8 / rate, rate, 9 << 30) for n, rate in rates[1:])
    found = {
        "small": render_html(small, measured(small), others),
        "deep": render_html(deep),
        "one": render_html(one),
    }
    return found | {path.stem: render_html(Plan.load(path)) for path in files}


def looks(text: str) -> dict[str, str]:
    """Suffix -> the page as a screenshot shows it: light, dark, as printed."""
    return {
        "": text,
        "-dark": text.replace("prefers-color-scheme: dark", "prefers-color-scheme: light"),
        "-print": text.replace("@media print", "@media all"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="The HTML report in a real browser.")
    parser.add_argument("--keep", type=Path, help="a folder for pages and screenshots")
    parser.add_argument("plans", nargs="*", type=Path, metavar="PLAN.json")
    options = parser.parse_args()
    program = browser()
    if program is None:
        print(f"needs one of {', '.join(NAMES)} on the PATH", file=sys.stderr)
        return 2
    folder = options.keep or Path(tempfile.mkdtemp(prefix="shardplan-report-"))
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name, text in pages(options.plans).items():
        driven = folder / f"{name}.driven.html"
        driven.write_text(text.replace("</body>", f"{DRIVER}</body>"))
        for width in WIDTHS:
            dump = drive(program, driven, width, ("--dump-dom",))
            found = re.search(r'<pre id="seen">(.*?)</pre>', dump, re.DOTALL)
            trouble = wrong(json.loads(html.unescape(found[1])), width) if found else ["the script did not run"]
            if len(text.encode()) >= MOST_NBYTES:
                trouble.append(f"the page has {len(text.encode()):,} bytes")
            print(f"{name:8} {width:5} px: {'; '.join(trouble) or 'ok'}")
            failures += bool(trouble)
            for suffix, shown in looks(text).items() if options.keep else ():
                page = folder / f"{name}{suffix}.html"
                page.write_text(shown)
                picture = folder / f"{name}{suffix}-{width}.png"
                drive(program, page, width, (f"--screenshot={picture}", "--hide-scrollbars"))
    if not options.keep:
        shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
