"""What commands print: goldens of their text, one JSON object under ``--json``, and every exit status."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer

from shardplan import cli, cli_work
from shardplan.errors import SolverTimeout
from tests.report_plans import pipeline_plan

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).parent / "goldens"
MLP = f"{ROOT / 'tests' / 'targets.py'}:mlp"
ROW = [
    "simulate", "--family", "llama", "--layers", "32", "--hidden", "4096", "--heads", "32", "--kv-heads", "8",
    "--ffn", "14336", "--vocab", "128256", "--seq", "4096", "--devices", "8xh100", "--tp", "2", "--pp", "2", "--dp",
    "2", "--micro-batch", "1", "--batch", "64",
]  # fmt: skip


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run the command line in a folder with two plan files; -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    pipeline_plan().save("a.json")
    pipeline_plan(2, 2, 8).save("b.json")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.run(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def is_golden(name: str, text: str) -> None:
    """Compares with ``tests/goldens``; SHARDPLAN_GOLDENS=write makes the file."""
    path = GOLDENS / name
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("SHARDPLAN_GOLDENS") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("cli_report.txt", ["report", "a.json"]),
        ("cli_explain.txt", ["report", "a.json", "--explain", "model.layers.1.mlp"]),
        ("cli_diff.txt", ["diff", "a.json", "b.json"]),
        ("cli_simulate.txt", [*ROW, "--stage-seconds", "forward=0.01,backward_input=0.02,send=0.001"]),
        ("cli_cluster_show.txt", ["cluster", "show", "2xh100"]),
        ("cli_cluster_list.txt", ["cluster", "list"]),
    ],
)
def test_text_is_as_it_was(command, name, arguments):
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    is_golden(name, out)


def test_flags_are_as_they_were():
    """Names that scripts use; their help may change."""
    lines = []

    def visit(name: str, found: Any) -> None:
        flags = [max(parameter.opts, key=len) for parameter in found.params if parameter.name != "help"]
        lines.append(f"{name}: {' '.join(sorted(flags))}")
        for sub, command in sorted(getattr(found, "commands", {}).items()):
            visit(f"{name} {sub}", command)

    visit("shardplan", typer.main.get_command(cli.app))
    is_golden("cli_flags.txt", "\n".join(lines))


@pytest.mark.parametrize(
    "arguments, keys",
    [
        (["report", "a.json"], {"schema", "model", "step_seconds", "decisions"}),
        (["report", "a.json", "--explain", "embed*"], {"schema", "pattern", "lines"}),
        (["diff", "a.json", "b.json"], {"schema", "changes"}),
        (["diff", "a.json", "a.json"], {"schema", "changes"}),
        (["cluster", "show", "2xh100"], {"schema", "summary", "devices", "file"}),
        (["cluster", "list"], {"schema", "devices", "nodes"}),
        (["cluster", "detect"], {"schema", "summary", "devices", "file"}),
        (["bench"], {"schema", "benchmarks"}),
        (["doctor"], {"schema", "ok", "findings"}),
        (ROW, {"id", "step_seconds", "fits"}),
        (["plan", MLP, "--devices", "2xh100", "--dp", "2"], {"schema", "decisions", "baselines"}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_json_is_one_object_on_stdout(command, arguments, keys):
    status, out, _ = command(*arguments, "--json")
    assert status in ((0, 7) if arguments == ["doctor"] else (0,))
    data = json.loads(out)
    assert keys <= set(data) and data.get("schema", 1) == 1


def test_a_diff_as_data(command):
    _, out, _ = command("diff", "a.json", "b.json", "--json")
    changes = json.loads(out)["changes"]
    assert next(c for c in changes if c["what"] == "degrees")["before"].endswith("4 microbatches")
    assert all(set(change) == {"what", "before", "after", "by"} for change in changes)


def test_every_exit_status(command, monkeypatch):
    """The table of docs/cli.md, 7 by `check` in test_check and by `doctor` in test_doctor."""
    seen = {}
    seen[0] = command("report", "a.json")
    seen[2] = command("plan", MLP, "--devices", "2xh100", "--pin", "nothing")
    seen[3] = command("plan", MLP, "--devices", "2xh100", "--memory", "1 KiB")
    seen[5] = command("plan", MLP.replace(":mlp", ":branching"), "--devices", "2xh100")
    Path("torn.json").write_text("{")
    seen[6] = command("report", "torn.json")

    def too_slow(job):
        raise SolverTimeout("no plan within 60 s", [], ["raise time_limit"])

    monkeypatch.setattr(cli_work, "make_plan", too_slow)
    seen[4] = command("plan", MLP)
    monkeypatch.setattr(cli_work, "make_plan", lambda job: 1 / 0)
    seen[1] = command("plan", MLP)
    assert {status: found[0] for status, found in seen.items()} == {status: status for status in range(7)}
    codes = {2: "SP101", 3: "SP301", 4: "SP303", 5: "SP201", 6: "SP402"}
    assert all(seen[status][2].startswith(code) for status, code in codes.items())
    assert "bug in shardplan" in seen[1][2] and not any(found[1] for status, found in seen.items() if status)
    table = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"| {status} | " in table for status in range(8))
