"""The report in all its forms, on plans made by hand. Goldens: ``tests/goldens/report_*.txt``."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shardplan.errors import NoMatch, UsageError
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Memory, Plan, StagePlan, Status
from shardplan.planner.report import (
    Measured,
    WhatIf,
    drawings,
    facts,
    pictures,
    render_html,
    render_json,
    render_terminal,
    render_text,
    render_trace,
    write_report,
)
from shardplan.planner.report.facts import simulate_plan
from shardplan.planner.report.json_form import SCHEMA
from shardplan.planner.report.traffic import traffic
from shardplan.planner.report.words import change_text, names_text, nbytes_text, pattern, ranges, seconds_text
from tests.report_plans import GIB, measured, pipeline_plan

GOLDENS = Path(__file__).parent / "goldens"


def bare_plan() -> Plan:
    """What the rewriter's tests make: no times, no nodes, no memory."""
    plan = pipeline_plan(1, 1, 1)
    stage = StagePlan(0, 1, ("all",), (0,), Mesh(("dp", "tp"), (1, 1)), 0.0, 0.0, 0.0, Memory())
    return dataclasses.replace(
        plan,
        model="",
        stages=(stage,),
        nodes={},
        splits={},
        links=(),
        step_seconds=0.0,
        status=Status("given", 0.0, 0.0, "none", 0.0),
        baselines=(),
        runners_up=(),
        coverage={},
        constraints=(),
        notes=(),
        replicated_ops=(),
        discovered_ops=(),
    )


def test_wide_golden() -> None:
    plan = pipeline_plan()
    assert render_text(plan, measured(plan), 100) == (GOLDENS / "report_100.txt").read_text()


def test_narrow_golden() -> None:
    text = render_text(pipeline_plan(), None, 80)
    assert text == (GOLDENS / "report_80.txt").read_text()


@pytest.mark.parametrize("width", [40, 80, 132])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_text_is_ascii_and_keeps_to_its_width(width: int, stages: int) -> None:
    plan = pipeline_plan(stages, 1, 3)
    text = render_text(plan, measured(plan), width)
    assert text.isascii()
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_plain_where_there_is_no_terminal() -> None:
    plan = pipeline_plan()
    plain, coloured = io.StringIO(), io.StringIO()
    render_terminal(plan, Console(file=plain, width=100))
    render_terminal(plan, Console(file=coloured, width=100, force_terminal=True, color_system="standard"))
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in coloured.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue()) == plain.getvalue()


def test_markup_in_names_is_text() -> None:
    """Neither rich nor HTML may read names as markup."""
    plan = dataclasses.replace(pipeline_plan(), model="[red]<b>&", notes=("[/] <script>alert(1)</script>",))
    text, page = render_text(plan), render_html(plan)
    assert "[red]<b>&" in text and "[/] <script>" in text
    assert page.count("<script") == 1 and "[red]&lt;b&gt;&amp;" in page


class _Page(HTMLParser):
    """Collects text, checks nesting and that nothing comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        assert not {"src", "href", "srcset"} & {name for name, _ in attrs}
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read_page(page: str) -> _Page:
    reader = _Page()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def test_html_is_whole_offline_and_says_what_the_text_says() -> None:
    plan = pipeline_plan()
    page = render_html(plan, measured(plan))
    reader = read_page(page)
    assert reader.tags["script"] == 1 and "link" not in reader.tags and "src=" not in page
    assert "http" not in page and "url(" not in page.replace("'url(#'", "") and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    bars = 2 + 2 + 3  # seconds of two stages, memory of two devices, three plans that run
    assert reader.tags["svg"] == bars + 2 + 2 + 1  # two timelines, two curves, the topology
    words = " ".join(reader.words)
    for said in (
        facts(plan).verdict,
        "model.layers.*.mlp.up_proj.weight",
        "15.5 GiB of 20.0 GiB, measured 14.2 GiB",
        "does not fit: 26 GiB of 20 GiB",
        "time of stage 1",
        "custom.router",
        "2.29x the speed of one device",
        'pin("*.layers.0.*", stage=0)',
    ):
        assert said in words, said
    bars = re.findall(r"<title>(\d[A-Z_]+\d*), ", page)
    computed = [
        str(s.instruction) for line in simulate_plan(plan).spans for s in line if s.end_seconds > s.start_seconds
    ]
    assert sorted(bars) == sorted(computed * 2)


def test_html_of_a_large_plan_stays_small() -> None:
    plan = pipeline_plan(16, 8, 512, 128)
    page = render_html(plan, measured(plan))
    assert len(page) < 500_000
    read_page(page)


def test_json_has_what_the_command_line_promises() -> None:
    plan = pipeline_plan()
    data = json.loads(render_json(plan, measured(plan)))
    promised = {
        "schema", "model", "devices", "step_seconds", "tokens_per_second", "stages", "microbatches", "schedule",
        "rematerialized", "peak_memory_bytes", "lower_bound_seconds", "gap", "solver", "trace_seconds",
        "profile_seconds", "solve_seconds", "baselines", "coverage", "replicated_ops", "discovered_ops",
    }  # fmt: skip
    assert promised <= data.keys()
    assert data["tokens_per_second"] == pytest.approx(8 * 128 / plan.step_seconds)
    assert data["peak_memory_bytes"] == {"a10g": 15.5 * GIB}
    assert data["stages"][1]["mesh"] == {"dp": 1, "tp": 2}
    assert data["rematerialized"] == ["model.layers.0.mlp"]
    assert data["measured"]["comparisons"][0]["measured"] == pytest.approx(1.1 * plan.step_seconds)
    assert json.loads(render_json(plan))["measured"] is None


def test_trace_holds_both_timelines() -> None:
    plan = pipeline_plan()
    records = json.loads(render_trace(plan, measured(plan)))["traceEvents"]
    assert [r["args"]["name"] for r in records if r["name"] == "process_name"] == ["predicted", "measured"]


@pytest.mark.parametrize(
    ("name", "start"),
    [("r.html", "<!doctype html>"), ("trace.json", '{"displayTimeUnit"'), ("r.json", "{\n"), ("r.txt", "Decoder on"),
     ("r.md", "```\nDecoder on")],
)  # fmt: skip
def test_the_suffix_chooses_the_form(tmp_path: Path, name: str, start: str) -> None:
    pipeline_plan().report(tmp_path / name)
    assert (tmp_path / name).read_text().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_unknown_suffix_and_unwritable_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no report format"):
        write_report(pipeline_plan(), tmp_path / "report.pdf")
    with pytest.raises(UsageError, match="cannot write"):
        write_report(pipeline_plan(), tmp_path / "none" / "report.html")


def test_report_prints(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline_plan().report()
    assert "Decoder on 4 devices" in capsys.readouterr().out


def test_a_bare_plan_still_has_a_report() -> None:
    plan = bare_plan()
    text = str(plan)
    assert "model on 1 device: pp1 x dp1 x tp1, 1 microbatch" in text
    assert "as given, not searched" in text
    read_page(render_html(plan))
    json.loads(render_json(plan))


def test_memory_over_the_limit_is_said() -> None:
    plan = pipeline_plan()
    tight = dataclasses.replace(
        plan, devices=tuple(dataclasses.replace(d, limit_nbytes=15 * GIB) for d in plan.devices)
    )
    text = render_text(tight)
    assert "DOES NOT FIT, 15.5 GiB of 15.0 GiB" in text
    assert "15.5 GiB of 15.0 GiB, 512 MiB OVER" in text
    assert "OVER" in render_html(tight)


def test_bars_far_below_the_limit_are_still_seen() -> None:
    plan = pipeline_plan()
    roomy = dataclasses.replace(
        plan, devices=tuple(dataclasses.replace(d, limit_nbytes=900 * GIB) for d in plan.devices)
    )
    text = render_text(roomy)
    assert "pppppp" in text and "The bars end at 15.5 GiB, far below the limit." in text
    page = render_html(roomy)
    assert 'class="limit"' not in page and "far below the limit" in page
    assert max(map(len, text.splitlines())) <= 100


def test_a_plan_slower_than_a_baseline_says_so() -> None:
    plan = pipeline_plan()
    slow = dataclasses.replace(plan, step_seconds=0.5)
    assert "SLOWER than tensor parallel, which takes 310 ms" in facts(slow).verdict


def test_measurement_of_another_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="stages"):
        facts(pipeline_plan(), Measured(1.0, stage_seconds=(1.0,)))
    with pytest.raises(ValueError, match="devices"):
        facts(pipeline_plan(), Measured(1.0, peak_nbytes=(1,)))
    with pytest.raises(ValueError, match="time"):
        Measured(0.0)


def test_one_pattern_split_in_two_ways_is_two_rows() -> None:
    plan = pipeline_plan()
    splits = {**plan.splits, "tp": {**plan.splits["tp"], "p_layers_3_up": "-:  -> R"}}
    found = facts(dataclasses.replace(plan, splits=splits)).splits
    ups = [(s.names[0], len(s.names), s.axes["tp"], s.local_nbytes) for s in found if "up_proj" in s.pattern]
    assert ups == [
        ("model.layers.0.mlp.up_proj.weight", 3, "dim 0", 256 * 64 * 4 // 2),
        ("model.layers.3.mlp.up_proj.weight", 1, "copies", 256 * 64 * 4),
    ]
    assert "model.layers.[0-2].mlp.up_proj.weight" in render_text(dataclasses.replace(plan, splits=splits))


def test_plan_with_links_and_nodes_survives_a_file(tmp_path: Path) -> None:
    plan = pipeline_plan()
    # A plan file holds no wall times of planning: the same input gives the same bytes.
    status = dataclasses.replace(plan.status, seconds=0.0)
    plan = dataclasses.replace(plan, status=status, trace_seconds=0.0, profile_seconds=0.0)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan) and loaded.explain("*") == plan.explain("*")
    assert render_json(loaded) == render_json(plan) and render_html(loaded) == render_html(plan)


# -- explain and diff --------------------------------------------------------------------------------------------------


def test_explain_a_module() -> None:
    assert pipeline_plan().explain("model.layers.2.mlp") == (
        "model.layers.2.mlp.up_proj.weight: param float32[256,64], stage 1\n"
        "  tp/2: dim 0 split: float32[128,64] each\n"
        "model.layers.2.mlp.down_proj.weight: param float32[64,256], stage 1\n"
        "  tp/2: dim 1 split: float32[64,128] each\n"
        "linear_4: aten.linear in model.layers.2.mlp.up_proj -> float32[8,128,256], stage 1\n"
        "  mb/4: split over letter b: S(0) R -> S(0)\n"
        "  tp/2: split over letter n: D S(0) -> S(2)\n"
        "  tp/2:   argument 0 from linear_3 (256 KiB) P -> D: all-reduce in forward, all-reduce of its gradient in "
        "backward\n"
        "linear_5: aten.linear in model.layers.2.mlp.down_proj -> float32[8,128,64], stage 1\n"
        "  mb/4: split over letter b: S(0) R -> S(0)\n"
        "  tp/2: split over letter k: S(2) S(1) -> P\n"
    )


def test_explain_says_when_nothing_matches() -> None:
    with pytest.raises(NoMatch, match=r"did you mean 'model\.layers\.\d\.mlp\.up_proj"):
        pipeline_plan().explain("model.layers.9.mlp.up_proj")
    with pytest.raises(UsageError, match="no node summaries"):
        bare_plan().explain("*")


def test_diff() -> None:
    plan = pipeline_plan()
    splits = {**plan.splits, "tp": {**plan.splits["tp"], "p_embed": "v:  -> S(0)"}}
    other = dataclasses.replace(plan, splits=splits, step_seconds=2 * plan.step_seconds, schedule="gpipe")
    assert plan.diff(other) == (
        "schedule: 1f1b -> gpipe\nstep: 159 ms -> 318 ms (+100 %)\nsplit embed.weight: tp copies -> tp dim 0\n"
    )
    assert plan.diff(plan) == "no difference\n"
    assert "degrees: pp2 x dp1 x tp2, 4 microbatches -> pp4 x dp1 x tp1, 8 microbatches" in plan.diff(
        pipeline_plan(4, 1, 8)
    )


# -- words -------------------------------------------------------------------------------------------------------------


def test_words() -> None:
    assert [seconds_text(s) for s in (0.0, 1.5e-9, 0.00099996, 0.0123456, 1234.5, None)] == [
        "0 s", "1.50 ns", "1.00 ms", "12.3 ms", "1,234 s", "-",
    ]  # fmt: skip
    assert [nbytes_text(n) for n in (0, 1023, 1024, 1.5 * GIB, None)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB", "-"]
    assert change_text(1.1, 1.0) == "+10 %" and change_text(0.99, 1.0) == "-1.0 %" and change_text(1.0, 0.0) == ""
    assert ranges([5, 0, 1, 2]) == "0-2, 5"
    assert pattern("layers.10.w1.3") == "layers.*.w1.*"
    assert names_text(["embed", "layers.0.mlp", "layers.1.mlp", "x.3.y"]) == "embed, layers.[0-1].mlp, x.3.y"


def test_a_notebook_shows_the_document_in_a_frame() -> None:
    plan = pipeline_plan()
    frame = plan._repr_html_()
    assert frame.startswith("<iframe") and html.unescape(frame.split('srcdoc="')[1].split('" style')[0]) == render_html(
        plan
    )


def test_visualize_says_who_holds_which_slice() -> None:
    plan = pipeline_plan()
    text = plan.visualize("*layers.3.mlp.down_proj.weight")
    assert text.splitlines() == [
        "model.layers.3.mlp.down_proj.weight  float32[64,256]",
        "  stage 1, device 2: [:, 0:128]",
        "  stage 1, device 3: [:, 128:256]",
    ]
    assert plan.visualize("embed.weight").splitlines()[1] == "  stage 0, devices 0-1: [:, :]"
    assert "a partial sum over tp" in plan.visualize("linear_1")
    with pytest.raises(NoMatch, match="down_proj"):
        plan.visualize("*layers.3.mlp.dwn_proj.weight")


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 4))
def test_slices_of_sections_lie_as_placements_say(sections: list[int], size: int) -> None:
    """Each section is cut evenly; together the parts are the whole, in the order that a rank keeps them."""
    lengths = [length * size for length in sections] or [size * 3]
    whole = list(range(sum(lengths)))
    expected: list[list[int]] = [[] for _ in range(size)]
    start = 0
    for length in lengths:
        for rank in range(size):
            step = length // size
            expected[rank] += whole[start + rank * step : start + (rank + 1) * step]
        start += length
    for rank in range(size):
        parts = pictures._cut([(0, len(whole))], tuple(lengths) if sections else (), size, rank)
        assert [i for low, high in parts for i in range(low, high)] == expected[rank]


def test_curves_keep_their_peak_when_they_are_thinned() -> None:
    points = tuple((float(i), i % 977) for i in range(50_000))
    thin = drawings._thinned(points, 100)
    assert len(thin) <= 100 and max(n for _, n in thin) == 976


def test_seconds_of_a_stage_add_up_to_the_step() -> None:
    plan = pipeline_plan()
    ops = {"aten.linear.default": (0.004, 0.008, 0.0), "aten.gelu.default": (0.001, 0.002, 0.001)}
    plan = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, op_seconds=ops) for s in plan.stages))
    (shares,) = pictures.seconds_of_stages(facts(plan))
    for row in shares.rows:
        assert row.seconds == pytest.approx(plan.step_seconds)
        assert ("aten.linear", "forward", pytest.approx(4 * 0.012)) in row.parts


def test_json_keeps_to_its_published_schema() -> None:
    schema = json.loads((Path(__file__).parent.parent / "docs" / "report.schema.json").read_text())
    plan = pipeline_plan()
    other = WhatIf("devices", "8", "pp1", 0.1, 10.0, GIB)
    for text in (
        render_json(plan),
        render_json(plan, measured(plan), (other, WhatIf("memory", "1 KiB", reason="does not fit"))),
        render_json(bare_plan()),
    ):
        jsonschema.validate(json.loads(text), schema)
    assert schema["properties"]["schema"] == {"const": SCHEMA}


def test_bytes_on_links_are_those_of_rings() -> None:
    """Two stages of two tensor-parallel devices in one node: an all-reduce of the down projection forward, and of the
    input's gradient backward, for every layer but the first input; activations between the stages."""
    plan = pipeline_plan()
    found = traffic(plan)
    tensor = 8 * 128 * 64 * 4
    by_kind = {(s.stage, s.axis, s.what): s.nbytes for s in found.sent}
    layers = sum(stage == 0 for node in plan.nodes.values() for stage in node.stages if node.op == "aten.linear") // 2
    # A ring of two sends each tensor once (2 * 1/2 of it); the first layer's input needs a gradient too: the embedding.
    assert by_kind[0, "tp", "all-reduce"] == pytest.approx((2 * layers - (len(plan.stages) > 1)) * tensor)
    messages = [s for s in found.sent if s.target >= 0]
    assert {(s.stage, s.target) for s in messages} == {(0, 1), (1, 0)}
    assert all(s.nbytes == plan.microbatches * plan.links[0].nbytes for s in messages if s.stage == 0)
    assert set(found.inside) == {0} and not found.between
    apart = dataclasses.replace(
        plan, devices=tuple(dataclasses.replace(d, node=r // 2) for r, d in enumerate(plan.devices))
    )
    assert set(traffic(apart).between) == {(0, 1), (1, 0)}


def test_the_map_shows_which_part_of_a_layer_a_device_holds() -> None:
    (found,) = pictures.held(facts(pipeline_plan()))
    rows = {name: cells for name, _, cells in found.rows}
    assert found.columns == (("0", 0), ("1", 0), ("2", 1), ("3", 1))
    assert rows["model.layers.[0-1]"] == ((0.0, 0.5), (0.5, 0.5), (0.0, 0.0), (0.0, 0.0))
    assert rows["embed"] == ((0.0, 1.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0))
    (many,) = pictures.held(facts(pipeline_plan(16, 8, 16, 32)))
    assert len(many.columns) <= 32 and "of 128 devices" in many.note


def test_what_if_is_drawn_over_its_numbers() -> None:
    plan = pipeline_plan()
    others = (
        WhatIf("devices", "8xa10g", "dp4", 0.1, 80.0, GIB, devices=8),
        WhatIf("memory", "40 GiB", "dp4", 0.1, 60.0, GIB),
        WhatIf("memory", "1 KiB", reason="does not fit"),
        WhatIf("links", "2x", "dp4", 0.1, 55.0, GIB),
        WhatIf("devices", "cluster.toml", "dp4", 0.1, 70.0, GIB),
    )
    plots = {plot.name: plot for plot in pictures.rates(facts(plan, None, others))}
    assert set(plots) == {"devices", "memory", "links"}
    assert [x for x, _, _ in plots["devices"].points] == [4.0, 8.0] and plots["devices"].marked == 4.0
    assert [x for x, _, _ in plots["memory"].points] == [20.0, 40.0]
    page = render_html(plan, None, others)
    assert page.count("<circle") == 6 and page.count('class="point here"') == 3 and 'class="even"' in page
    text = io.StringIO()
    render_terminal(plan, Console(file=text, width=100), None, others)
    assert "samples/s over devices" in text.getvalue() and "(this plan) [" in text.getvalue()


def test_what_is_inexact_is_in_the_verdict() -> None:
    plan = dataclasses.replace(pipeline_plan(), notes=("INEXACT: sums are rounded", "something else"))
    assert facts(plan).verdict.endswith("; INEXACT: sums are rounded.")
