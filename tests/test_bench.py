"""`shardplan bench` finds the benchmarks of the checkout and passes on what follows their names."""

from pathlib import Path

import pytest

from shardplan import bench, cli
from shardplan.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def test_every_benchmark_with_a_command_line_is_listed(capsys):
    assert cli.run(["bench"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(bench.benchmarks()) and {"prediction", "regret", "search", "published", "cluster"} <= set(
        listed
    )
    assert all(bench.benchmarks().values())


def test_arguments_and_status_pass_through(capfd):
    assert cli.run(["bench", "published", "--summary"]) == 0
    assert "hold-out" in capfd.readouterr().out
    assert cli.run(["bench", "published", "--no-such-flag"]) == 2


def test_an_unknown_name_and_a_missing_checkout_are_usage_errors(tmp_path, capsys):
    assert cli.run(["bench", "nosuch"]) == 2
    assert "prediction" in capsys.readouterr().err
    with pytest.raises(UsageError, match="not here"):
        bench.benchmarks(tmp_path / "nothing")
