"""Faults under torchrun: every rank ends with an error that names the rank and its place, restarts go on exactly, and
no process is left."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests import jobs
from tests.faults import sabotage

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 240.0
_MARK = "SHARDPLAN_TEST_JOB"


class Job:
    """A script under torchrun on this machine."""

    def __init__(self, path: Path, body: str, *options: str, ranks: int = 2) -> None:
        path.mkdir(parents=True, exist_ok=True)
        script = path / "train.py"
        script.write_text(textwrap.dedent(body))
        self.output_file = path / "output"
        place = [] if any("rdzv" in option or "master" in option for option in options) else ["--standalone"]
        command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(ranks), *options]
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", _MARK: self.mark}
        with open(self.output_file, "w") as output:
            self.process = subprocess.Popen([*command, str(script)], stdout=output, stderr=output, env=environment)

    def wait(self, seconds: float = LONGEST_SECONDS) -> tuple[int, str]:
        """-> exit status, output. No process of the job is left."""
        try:
            status = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
        deadline = time.monotonic() + 40.0
        while left := marked(self.mark):
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.output_file.read_text()}"
            time.sleep(0.05)
        return status, self.output_file.read_text()


def marked(mark: str) -> list[int]:
    """Live processes that have inherited the mark in their environment (torchrun gives ranks sessions of their own)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_MARK}={mark}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in found if sabotage.alive(pid)]


def plan_file(rng: random.Random, path: Path) -> str:
    path.mkdir(parents=True, exist_ok=True)
    plan = rng.choice([jobs.plan(dp=2), jobs.plan(pp=2, microbatches=2), jobs.plan(tp=2, seed=1)])
    plan.save(path / "plan.json")
    return str(path / "plan.json")


def elastic(rng: random.Random, path: Path) -> str:
    """A rank is killed, torchrun starts all anew: every step's loss is that of a run without a fault."""
    plan, steps = plan_file(rng, path), rng.randint(150, 400)
    log, saved = path / "log", path / "saved"
    job = Job(
        path,
        f"from tests import jobs\njobs.main({plan!r}, {str(saved)!r}, {steps}, {rng.randint(5, 40)}, {str(log)!r})\n",
        "--max-restarts=3",
    )
    at, how = rng.randint(60, 120), rng.choice([signal.SIGKILL, signal.SIGTERM])
    deadline = time.monotonic() + 120
    while (not log.exists() or len(log.read_text().splitlines()) < at) and job.process.poll() is None:
        assert time.monotonic() < deadline, job.output_file.read_text()
        time.sleep(0.01)
    assert job.process.poll() is None, job.output_file.read_text()
    ranks = [pid for pid in marked(job.mark) if b"train.py" in _command(pid)]
    victim = rng.choice([pid for pid in ranks if b"torch.distributed.run" not in _command(pid)])
    os.kill(victim, how)
    status, output = job.wait()
    assert status == 0, output
    lines = [line.split() for line in log.read_text().splitlines()]
    found = {int(step): float(loss) for step, loss, _ in lines}
    again = len(lines) - len(found)
    assert len({pid for *_, pid in lines}) == 2 and sorted(found) == list(range(1, steps + 1))
    for step, loss, _ in lines:
        assert float(loss) == found[int(step)], f"step {step}: {loss} and {found[int(step)]}"
    from shardplan.planner.plan import Plan

    with jobs.start(Plan.load(plan)) as pm:
        assert [found[step] for step in sorted(found)] == jobs.train(pm, steps)
    return f"{how.name} at step {at} of {steps}, {again} steps done again"


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


FAULT = """
    import os, signal
    from tests import jobs
    pm = jobs.start({plan!r}, "auto", heartbeat_seconds=4.0, timeout_seconds=30.0)
    sampler = pm.sampler(jobs.Samples(), seed=5)
    jobs.train(pm, {steps}, sampler)
    rank = int(os.environ["RANK"])
    x, y = jobs.Samples().x[:8], jobs.Samples().y[:8]
    {fault}
    try:
        for _ in range(1000):
            pm.train_step(x, target=y)
    except Exception as error:
        print(f"RANK {{rank}} {{type(error).__name__}} {{error}} END", flush=True)
        raise SystemExit(1)
"""


def stopped_rank(rng: random.Random, path: Path) -> str:
    """A rank is stopped: the other says so, and all end."""
    rank = rng.randrange(2)
    fault = f"rank == {rank} and os.kill(os.getpid(), signal.SIGSTOP)"
    started = time.monotonic()
    job = Job(path, FAULT.format(plan=plan_file(rng, path), steps=rng.randint(1, 5), fault=fault))
    status, output = job.wait()
    assert status != 0 and f"rank {rank} gave no sign of life for 4 s, at " in output, output
    return f"rank {rank}, {time.monotonic() - started:.0f} s in all"


def killed_rank(rng: random.Random, path: Path) -> str:
    """A rank is killed at an instruction: the other ends with an error that names its place and its peers."""
    rank, index = rng.randrange(2), rng.randrange(30)
    fault = (
        f"from tests.faults import sabotage; sabotage.signal_at(pm._ranks().session, {rank}, {index}, signal.SIGKILL)"
    )
    job = Job(path, FAULT.format(plan=plan_file(rng, path), steps=rng.randint(1, 5), fault=fault))
    status, output = job.wait()
    assert status != 0, output
    assert f"RANK {1 - rank} WorkerFailed" in output and f"rank {1 - rank} lost a peer at " in output, output
    assert "instruction " in output and "SIGKILL" in output
    return f"rank {rank} at instruction {index}"


def diverging(rng: random.Random, path: Path) -> str:
    """A rank makes another call, or passes another batch: both are told which."""
    how = rng.choice(["batch", "call"])
    fault = {"batch": "x = x + rank", "call": "rank and pm(x)"}[how]
    job = Job(path, FAULT.format(plan=plan_file(rng, path), steps=rng.randint(1, 5), fault=fault))
    status, output = job.wait()
    word = "has another batch on rank" if how == "batch" else " on rank 1 and "
    assert status != 0 and word in output, output
    return how


def mismatch(rng: random.Random, path: Path) -> str:
    """Ranks with other versions, plans or models refuse to start, all with the same error."""
    how = rng.choice(["version", "plan", "model"])
    one, other = path / "one.json", path / "other.json"
    path.mkdir(parents=True, exist_ok=True)
    jobs.plan(dp=2).save(one)
    jobs.plan(pp=2).save(other)
    body = f"""
        import os, shardplan
        from tests import jobs
        rank = int(os.environ["RANK"])
        if rank and {how!r} == "version":
            shardplan.__version__ = "0.0.0"
        if rank and {how!r} == "model":
            from torch import nn
            jobs.model = lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))
        plan = {str(one)!r} if rank == 0 or {how!r} != "plan" else {str(other)!r}
        try:
            jobs.start(plan, "auto", timeout_seconds=30.0)
        except Exception as error:
            print(f"RANK {{rank}} {{type(error).__name__}} {{error}} END", flush=True)
            raise SystemExit(1)
    """
    status, output = Job(path, body).wait()
    assert status != 0, output
    for rank in range(2):
        assert f"RANK {rank} PlanMismatch" in output, output
    return how


def port_in_use(rng: random.Random, path: Path) -> str:
    """The port that torchrun was told is taken: an error in time, and nothing left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        body = f"from tests import jobs\njobs.start({plan_file(rng, path)!r}, 'auto', timeout_seconds=20.0)\n"
        options = "--master-addr=127.0.0.1", f"--master-port={port}"
        started = time.monotonic()
        status, output = Job(path, body, *options).wait()
    assert status != 0 and time.monotonic() - started < 120, output
    assert "in use" in output.lower() or "EADDRINUSE" in output or "timed out" in output.lower(), output
    # Our own workers listen on a port that the system chose, and hold it from then on.
    with jobs.start(jobs.plan(dp=2)) as pm:
        assert len(jobs.train(pm, 1)) == 1
    return f"port {port}"


SCENARIOS: dict[str, Callable[[random.Random, Path], str]] = {
    scenario.__name__: scenario for scenario in (elastic, stopped_rank, killed_rank, diverging, mismatch, port_in_use)
}
