"""``shardplan simulate``: rows of a file, one row from flags, mistakes, the table for people."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardplan import cli
from shardplan.planner.cluster import Cluster

GOOD = {
    "id": "a", "family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336,
    "vocab": 128256, "seq_len": 8192, "devices": "8xh100", "tp": 2, "pp": 2, "dp": 2, "micro_batch": 1,
    "global_batch": 16, "zero": 1, "sequence_parallel": True, "recompute": "selective", "precision": "bf16",
}  # fmt: skip
FLAGS = [
    "--id", "a", "--family", "llama", "--layers", 32, "--hidden", 4096, "--heads", 32, "--kv-heads", 8,
    "--ffn", 14336, "--vocab", 128256, "--seq", 8192, "--devices", "8xh100", "--tp", 2, "--pp", 2, "--dp", 2,
    "--micro-batch", 1, "--batch", 16, "--zero", 1, "--sequence-parallel", "--recompute", "selective",
    "--precision", "bf16",
]  # fmt: skip


@pytest.fixture
def command(capsys):
    """Run ``shardplan simulate``; -> exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.run(["simulate", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def answers(stdout: str) -> dict[str, dict]:
    return {answer["id"]: answer for answer in map(json.loads, stdout.splitlines())}


def test_rows_are_answered_in_order_and_wrong_ones_named(command, tmp_path):
    given = write(
        tmp_path / "rows.jsonl",
        GOOD,
        GOOD | {"id": "typo", "devices": "8xh1000"},
        "\n",
        "{broken\n",
        "[1]\n",
        GOOD | {"id": "b", "recompute": None},
    )
    status, stdout, stderr = command("--rows", given, "--json")
    assert status == 2
    assert list(answers(stdout)) == ["a", "typo", "4", "5", "b"]
    found = answers(stdout)
    assert "nearest: h100" in found["typo"]["error"]
    assert found["b"]["step_seconds"] < found["a"]["step_seconds"]
    lines = stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["row typo", "row 4", "row 5"]
    assert "unknown device 'h1000'" in lines[0] and "not JSON" in lines[1] and "JSON object" in lines[2]


def test_flags_say_what_a_row_says(command, tmp_path):
    status, stdout, stderr = command("--rows", write(tmp_path / "rows.jsonl", GOOD), "--json")
    assert (status, stderr) == (0, "")
    status, again, stderr = command(*FLAGS, "--json")
    assert (status, stderr) == (0, "")
    assert json.loads(stdout) == json.loads(again)
    _, shares, _ = command(*FLAGS, "--layers-per-stage", "20,12", "--json")
    assert json.loads(shares)["peak_memory_bytes"] != json.loads(stdout)["peak_memory_bytes"]


def test_stage_seconds_from_flags(command):
    status, stdout, _ = command(
        "--pp", 8, "--schedule", "zb", "--micro-batch", 6, "--batch", 144, "--json",
        "--stage-seconds", "forward=0.018522,backward_input=18.086 ms,backward_weight=0.009337,send=0.000601",
    )  # fmt: skip
    assert status == 0
    assert json.loads(stdout)["bubble_fraction"] == pytest.approx(0.1585, abs=1e-3)


def test_a_cluster_file_and_a_memory_limit(command, tmp_path):
    path = tmp_path / "cluster.toml"
    Cluster.preset("dgx-h100").save(path)
    rows = write(tmp_path / "rows.jsonl", {k: v for k, v in GOOD.items() if k != "devices"})
    status, stdout, _ = command("--rows", rows, "--cluster", path, "--json")
    assert status == 0 and json.loads(stdout)["fits"] is True
    status, stdout, _ = command("--rows", rows, "--cluster", path, "--memory", "10 GiB", "--json")
    assert status == 0 and json.loads(stdout)["fits"] is False
    status, _, stderr = command("--rows", rows, "--json")
    assert status == 2 and "devices: is missing" in stderr


def test_the_table_is_for_people(command, tmp_path):
    rows = write(tmp_path / "rows.jsonl", GOOD, GOOD | {"id": "slow", "recompute": "full"}, GOOD | {"id": "x", "tp": 3})
    status, stdout, stderr = command("--rows", rows)
    assert status == 2
    lines = stdout.splitlines()
    assert "tokens/s" in lines[0] and "peak GiB" in lines[0]
    assert lines[1].startswith("a ") and lines[2].startswith("slow ") and len(lines) == 3
    assert stderr.startswith("row x: tp: 3 does not divide heads")


def test_rows_from_stdin(command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(GOOD)))
    status, stdout, _ = command("--rows", "-", "--json")
    assert status == 0 and json.loads(stdout)["id"] == "a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to simulate"),
        (["--rows", "rows.jsonl", "--tp", 2], "--tp"),
        (["--rows", "absent.jsonl"], "cannot read absent.jsonl"),
        ([*FLAGS, "--layers-per-stage", "a,b"], "--layers-per-stage"),
        ([*FLAGS, "--stage-seconds", "1"], "--stage-seconds"),
        ([*FLAGS, "--memory", "much"], "--memory"),
    ],
)
def test_mistakes_in_flags(command, arguments, words):
    status, stdout, stderr = command(*arguments)
    assert status == 2 and stdout == "" and words in stderr


def test_it_starts_without_torch():
    code = "import sys; from shardplan.planner import analytic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
