"""What goes wrong ends with the right error, in time, and leaves nothing running."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import shardplan as sp
from shardplan import cli, errors
from tests import targets
from tests.faults import scenarios
from tests.faults import torchrun as torchrun_faults

ROOT = Path(__file__).resolve().parent.parent
HERE = str(ROOT / "tests" / "targets.py")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    targets.data_parallel_plan().save(path)
    return str(path)


# -- a rank that fails -------------------------------------------------------------------------------------------------


def session_of(pid: int) -> list[int]:
    """Live processes of the session that `pid` leads."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[3]) == pid:
            found.append(int(entry.name))
    return found


def job(tmp_path: Path, launcher: list[str], plan: str, how: str, devices: str) -> tuple[int, str, float]:
    """As `run`, of `targets.train`."""
    body = f"""
        from tests import targets
        targets.train({plan!r}, {how!r}, {devices})
        """
    return run(tmp_path, body, launcher)


def torchrun(tmp_path: Path, body: str, *options: str) -> tuple[int, str, float]:
    """As `run`, under torchrun with two ranks."""
    return run(tmp_path, body, [*TORCHRUN, *options])


def run(tmp_path: Path, body: str, launcher: list[str]) -> tuple[int, str, float]:
    """Run a script; -> exit status, output, seconds. Checks that no process is left."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 10
    while left := session_of(process.pid):
        assert time.monotonic() < deadline, f"left behind: {left}\n{output}"
        time.sleep(0.05)
    return process.returncode, output, seconds


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLACES = {"script": ([], '["cpu", "cpu"]'), "torchrun": (TORCHRUN, '"auto"')}


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_raises_ends_the_job(tmp_path, plan_file, place):
    launcher, devices = PLACES[place]
    status, output, seconds = job(tmp_path, launcher, plan_file, "raise", devices)
    assert status != 0
    assert "ArithmeticError: the optimizer of rank 1 failed" in output
    assert 'targets.py", line' in output and "LOSSES" not in output
    assert seconds < 30 or os.getloadavg()[0] > 3


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_is_killed_ends_the_job(tmp_path, plan_file, place):
    launcher, devices = PLACES[place]
    status, output, seconds = job(tmp_path, launcher, plan_file, "kill", devices)
    assert status != 0
    assert "SIGKILL" in output and "LOSSES" not in output
    assert "rank 1 was killed" in output or "rank      : 1" in output
    assert seconds < 30 or os.getloadavg()[0] > 3


def test_torchrun_trains_as_one_device_does(tmp_path, plan_file):
    launcher, devices = PLACES["torchrun"]
    status, output, _ = job(tmp_path, launcher, plan_file, "well", devices)
    assert status == 0, output
    lines = [line for line in output.splitlines() if line.startswith("LOSSES")]
    assert len(lines) == 1
    model, (x, y), loss_fn = targets.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for found in lines[0].split()[1:]:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        assert float(found) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["killed", "stopped", "full_disk", "killed_in_save"])
def test_a_fault_of_each_kind(name, tmp_path):
    """One of those that ``python -m tests.faults`` makes in a loop."""
    scenarios.SCENARIOS[name](random.Random(name), tmp_path / "checkpoints")


def test_starts_and_stops_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(scenarios.many_starts, "count", 1)
    scenarios.SCENARIOS["many_starts"](random.Random(0), tmp_path)


@pytest.mark.parametrize("name", ["elastic", "mismatch"])
def test_a_fault_under_torchrun(name, tmp_path):
    torchrun_faults.SCENARIOS[name](random.Random(name), tmp_path)


# -- what cannot work is refused ---------------------------------------------------------------------------------------


def command(capsys, *arguments: str) -> tuple[int, str]:
    """Run the command line in this process; -> exit status, stderr."""
    status = cli.run(arguments)
    return status, capsys.readouterr().err


def test_memory_limit_below_any_plan(capsys):
    status, err = command(capsys, "plan", f"{HERE}:mlp", "--devices", "cpu:2", "--memory", "500 B")
    assert status == 3
    assert err.startswith("SP301 NoFeasiblePlan") and "500 B" in err and "over" in err
    model, example, loss_fn = targets.mlp()
    with pytest.raises(errors.NoFeasiblePlan, match="SP301"):
        sp.auto_parallel(model, ["cpu"] * 2, example, loss_fn, memory_limit=500)


def test_world_size_mismatch(capsys, monkeypatch, plan_file):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, err = command(capsys, "run", f"{HERE}:mlp", "--devices", "cpu:2")
    assert status == 6
    assert err.startswith("SP501 WorldSizeMismatch: the plan needs 2 ranks") and "3 were started" in err
    assert "torchrun --nproc-per-node 2" in err
    model, example, loss_fn = targets.mlp()
    with pytest.raises(errors.WorldSizeMismatch, match=r"2 ranks \(pp1 x dp2 x tp1"):
        sp.auto_parallel(model, "auto", example, loss_fn, plan=plan_file)


def test_untraceable_model(capsys):
    status, err = command(capsys, "plan", f"{HERE}:branching", "--devices", "cpu:2")
    assert status == 5
    assert err.startswith("SP201 NotTraceable") and "targets.py:" in err
    model, example = targets.branching()
    with pytest.raises(errors.NotTraceable):
        sp.auto_parallel(model, ["cpu"] * 2, example)


def test_glob_that_matches_nothing(capsys):
    status, err = command(capsys, "plan", f"{HERE}:mlp", "--devices", "cpu:2", "--pin", "0.weigth=0")
    assert status == 2
    assert err.startswith("SP102 NoMatch") and "0.weigth" in err and "0.weight" in err
    model, example, loss_fn = targets.mlp()
    with pytest.raises(errors.NoMatch):
        sp.plan(model, ["cpu"] * 2, example, loss_fn, constraints=[sp.split("nothing.*", dim=0)])


def test_stale_and_torn_plan_files(capsys, tmp_path, plan_file):
    status, err = command(capsys, "run", f"{HERE}:wider_mlp", "--devices", "cpu:2", "--plan", plan_file)
    assert status == 6
    assert err.startswith("SP401 PlanMismatch") and "model graph" in err
    model, (x, y), loss_fn = targets.mlp()
    with pytest.raises(errors.PlanMismatch, match=r"float32\[8,8\].*float32\[16,8\]"):
        sp.auto_parallel(model, ["cpu"] * 2, (torch.cat([x, x]), torch.cat([y, y])), loss_fn, plan=plan_file)
    with pytest.raises(errors.PlanMismatch, match="devices: planned for 2, given 3"):
        sp.auto_parallel(model, ["cpu"] * 3, (x, y), loss_fn, plan=plan_file)
    torn = tmp_path / "torn.json"
    torn.write_text(Path(plan_file).read_text()[:-40])
    status, err = command(capsys, "report", str(torn))
    assert status == 6 and err.startswith("SP402 PlanFileError")
    assert command(capsys, "report", str(tmp_path / "none.json"))[0] == 6


def test_running_on_devices_that_are_not_here_names_the_torchrun_line():
    model, (x, y), loss_fn = targets.mlp()
    pm = sp.auto_parallel(model, "16xh100", (x, y), loss_fn, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert len(pm.plan.devices) == 16
    with pytest.raises(errors.NotRunnableHere, match="torchrun --nnodes 2 --nproc-per-node 8"):
        pm.train_step(x, target=y)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"precision": "fp16"}, errors.NotSupported),
        ({"objective": "both"}, errors.UsageError),
        ({"schedule": "dualpipe"}, errors.NotSupported),
        ({"microbatches": 0}, errors.UsageError),
        ({"optimizer": lambda parameters: None}, errors.UsageError),
        ({"solver": "abacus"}, errors.UsageError),
        ({"memory_limit": "much"}, errors.UsageError),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, error):
    model, example, loss_fn = targets.mlp()
    with pytest.raises(error):
        sp.plan(model, "2xh100", example, loss_fn, **settings)


def test_batches_that_were_not_planned_for_are_named(plan_file):
    model, (x, y), loss_fn = targets.mlp()
    with sp.auto_parallel(model, ["cpu"] * 2, (x, y), loss_fn, plan=plan_file) as pm:
        with pytest.raises(errors.InputMismatch, match="different numbers of samples"):
            pm.step(x[:4], target=y)
        with pytest.raises(errors.InputMismatch, match=r"input target is float32\[8\], planned for int64\[8\]"):
            pm.step(x, target=y.float())
        with pytest.raises(errors.InputMismatch, match="target is missing"):
            pm.step(x)
        with pytest.raises(errors.InputMismatch, match="does not take"):
            pm.step(x, x, target=y)
        with pytest.raises(errors.UsageError, match="needs an optimizer"):
            pm.train_step(x, target=y)
        with pytest.raises(errors.NotSupported):
            pm.parameters()
        assert pm.step(x, target=y).item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    with pytest.raises(errors.UsageError, match="closed"):
        pm.step(x, target=y)
