"""The benchmarks' own parts: the protocol's arithmetic, targets and comparison, the page; and a tiny cell that runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import chart, emulated, page, protocol, records, regret, regret_cells, scaling, suite
from benchmarks.cluster import uniform
from benchmarks.emulated import Conditions, Measured
from tests.ranks import pool


def _measured(name: str, predicted: float, seconds: float, nbytes: int = 0) -> Measured:
    return Measured(name, "pp1", predicted, seconds, (seconds,), (nbytes,), (nbytes,))


def test_differences_within_a_tie_do_not_count_as_wrong_order():
    found = [_measured("planner", 1.00, 1.00), _measured("a", 1.01, 0.98), _measured("b", 2.0, 2.2)]
    assert regret.rank_correlation(found) == pytest.approx(1.0)
    assert regret.rank_correlation(found, ties=False) == pytest.approx(0.5)
    wrong = [_measured("planner", 1.0, 2.0), _measured("a", 1.5, 1.5), _measured("b", 2.0, 1.0)]
    assert regret.rank_correlation(wrong) == pytest.approx(-1.0)
    assert protocol.tied(1.0, 1.049) and not protocol.tied(1.06, 1.0)


def test_regret_is_of_plans_that_keep_the_limit():
    found = [_measured("planner", 1.0, 1.2, 10), _measured("single", 1.0, 1.0, 20), _measured("ZeRO-3", 1.0, 1.1, 5)]
    assert regret.regret(regret.timed(found)) == pytest.approx(1.2)
    assert regret.regret(regret.timed(found, 15)) == pytest.approx(1.2 / 1.1)
    assert regret.regret(regret.timed(found, 8)) == float("inf")
    assert regret.by_hand(regret.timed(found, 15)) == found[2]


def test_the_cells_are_what_was_promised():
    cells = regret_cells.CELLS
    assert len({cell.key for cell in cells}) == len(cells) >= 48
    assert len({cell.job.partition("@")[0] for cell in cells}) >= 6
    assert {len(cell.shares) for cell in cells} == {2, 4}
    assert any(cell.limit_nbytes for cell in cells) and any(len(set(cell.shares)) > 1 for cell in cells)
    for cell in cells:
        names = [want.name for want in cell.wanted()]
        assert names[0] == regret_cells.CHOSEN and len(set(names)) == len(names)


def test_a_target_says_whether_it_is_met_and_why_not(tmp_path):
    least, most = records.Target("order", 0.97, most=False, why="noise"), records.Target("regret", 1.03)
    file = tmp_path / "suite.json"
    records.write(file, "suite", [least.check(0.5), most.check(1.0)], comparable={"seconds": 2.0})
    now = records.read(file)
    assert [target["met"] for target in now["targets"]] == [False, True]
    assert {"date", "torch", "commit", "cores", "processor"} <= now["machine"].keys()
    before = {"comparable": {"order": 0.9, "regret": 1.0, "seconds": 3.0, "gone": 1.0}}
    verdicts = {name: verdict for name, _, _, verdict in records.compare(now, before)}
    assert verdicts == {"order": "worse", "regret": "same", "seconds": "better"}
    assert not records.Target("x", 1.0).check(float("nan")).met


def test_the_page_is_made_of_the_results_alone(tmp_path):
    cell = regret_cells.CELLS[0]
    found = {cell.key: [_measured(want.name, 0.1, 0.2) for want in cell.wanted()]}
    regret.write(tmp_path / "regret.json", found, {cell.key: 1.0}, {cell.key: cell})
    points = scaling.curves(scaling.Model({**scaling.MODELS["llama-8b"].fields, "layers": 2}, 8, (8, 16)))
    records.write(tmp_path / "scaling.json", "scaling", assumptions=scaling.assumptions(), models={"tiny": points})
    missed = records.Target("speed", 1.0, why="the moon").check(2.0)
    records.write(tmp_path / "other.json", "other", [missed], rows=[{"what": "a", "ms": 3.0}])
    out = tmp_path / "page.md", tmp_path / "drawings"
    page.write(tmp_path, *out)
    text = out[0].read_text()
    assert cell.key.replace("|", "/") in text and "the moon" in text and "| a | 3 |" in text
    drawings = {path.name: path.read_text() for path in out[1].glob("*.svg")}
    assert {"regret.svg", "scaling_strong.svg", "scaling_weak.svg"} <= drawings.keys()
    page.write(tmp_path, *out)
    assert out[0].read_text() == text and {p.name: p.read_text() for p in out[1].glob("*.svg")} == drawings


def test_charts_are_drawings_of_every_point():
    text = chart.lines("t", "x", "y", {"a<b": [(1, 1.0), (10, 2.0)], "c": [(1, 3.0)]}, log_x=True)
    assert text.count("<circle") == 3 and "a&lt;b" in text and text.endswith("</svg>\n")
    assert chart.bars("t", "ms", {"one": 1.0, "two": 2.0}).count("<rect") == 3


def test_the_runner_knows_its_suites():
    for known in suite.SUITES:
        assert (Path(suite.__file__).parent / f"{known.name}.py").exists()
        assert str(known.file) in known.command(smoke=False, loopback=False)


def _on_rank(rank: int, *arguments: object) -> list[Measured]:
    kept = dict(os.environ)
    try:
        return emulated._on_rank(rank, *arguments)  # type: ignore[arg-type]
    finally:
        os.environ.clear()
        os.environ.update(kept)


def test_a_tiny_cell_runs_and_orders_its_plans(tmp_path):
    (cell,) = regret_cells.SMOKE
    conditions = Conditions((1.0, 1.0), repeats=2, memory=False, link_seconds=0.4)
    names = "planner", "single", "data parallel", "ZeRO-3", "pipeline m2 cut 0.5", "pipeline m8 cut 0.5"
    wanted = [want for want in cell.wanted() if want.name in names]
    found = pool(2).run(_on_rank, "loopback", cell.job, wanted, str(tmp_path), conditions)[0]
    assert [m.name for m in found] == [want.name for want in wanted]
    runs = regret.timed(found)
    assert set(names[:-1]) == runs.keys()
    assert all(m.predicted_seconds > 0 and len(m.samples) == 2 for m in runs.values())
    assert json.loads(json.dumps(asdict(found[0])))["degrees"] == found[0].degrees
    other = next(m for m in found if m.name == "pipeline m8 cut 0.5")
    assert "does not divide" in other.error
    assert uniform(2).name == "unlimited, 0 ms"
