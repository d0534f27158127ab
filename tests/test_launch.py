"""Workers: what travels to them and back, how they fail, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.errors import CheckpointError, UsageError, WorkerFailed, WorkerTimeout
from shardplan.runtime import messages
from shardplan.runtime.launch import Workers

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]


# Functions of a test module travel by name, and workers do not have the module: send them by value.
def by_value(function):
    function.__module__ = "__main__"
    return function


@pytest.fixture(scope="module")
def pair():
    with Workers(["cpu", "cpu"], timeout_seconds=60) as workers:
        workers.wait_ready()
        yield workers


# -- messages ----------------------------------------------------------------------------------------------------------


def through(value):
    ours, theirs = socket.socketpair()
    a, b = messages.Channel(ours), messages.Channel(theirs)
    try:
        sender = threading.Thread(target=a.send, args=(value, 20.0))
        sender.start()
        found = b.receive(20.0)
        sender.join()
        return found
    finally:
        a.close()
        b.close()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    grad=st.booleans(),
    transposed=st.booleans(),
)
def test_any_dense_tensor_travels(shape, dtype, grad, transposed):
    tensor = torch.randint(0, 2, shape).to(dtype)
    tensor = tensor.mT if transposed and tensor.ndim >= 2 else tensor
    if grad and dtype.is_floating_point:
        tensor = tensor.clone().requires_grad_()
    found = through({"x": [tensor, 3, "text"]})["x"]
    assert found[1:] == [3, "text"]
    assert found[0].dtype == dtype and found[0].shape == tensor.shape
    assert found[0].requires_grad == tensor.requires_grad
    assert torch.equal(found[0].detach(), tensor.detach())
    with torch.no_grad():
        found[0].fill_(0)  # its memory is its own and may be written to


def test_one_object_stays_one():
    """Tied parameters are still tied on the other side, and keep their class."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    found = through(model)
    assert found[0].weight is found[1].weight
    assert isinstance(found[0].weight, torch.nn.Parameter)
    assert torch.equal(found[0].weight, model[0].weight)


def test_big_tensors_are_not_copied_into_the_pickle():
    frame = messages.encode(torch.zeros(1 << 20))
    assert len(frame) == 3 and len(frame[1]) < 1000 and len(frame[2]) == 4 << 20


def test_receive_says_that_the_other_end_is_gone_or_late():
    ours, theirs = socket.socketpair()
    a, b = messages.Channel(ours), messages.Channel(theirs)
    with pytest.raises(messages.Late):
        a.receive(0.05)
    ours.send(b"\x08\x00")  # half a header
    b_thread = threading.Timer(0.05, a.close)
    b_thread.start()
    with pytest.raises(messages.Closed):
        b.receive(5.0)
    b.close()


def test_a_tensor_with_a_graph_is_refused():
    with pytest.raises(ValueError, match="detach"):
        messages.encode(torch.ones(2, requires_grad=True) * 2)


# -- calls -------------------------------------------------------------------------------------------------------------


@by_value
def total(session, x):
    y = x.clone()
    dist.all_reduce(y)
    return session.rank, y


def test_every_worker_answers_and_they_share_a_group(pair):
    answers = pair.call(total, torch.tensor([1.5, 2.0], dtype=torch.bfloat16))
    assert [rank for rank, _ in answers] == [0, 1]
    assert all(torch.equal(y, torch.tensor([3.0, 4.0], dtype=torch.bfloat16)) for _, y in answers)


def test_lambdas_and_own_arguments_per_rank(pair):
    assert pair.call_each(lambda session, x: (session.rank, x * 2), [(1,), (2,)]) == [(0, 2), (1, 4)]


def test_workers_run_on_one_thread(pair):
    assert pair.call(lambda session: torch.get_num_threads()) == [1, 1]


def test_an_error_of_our_own_on_every_rank_leaves_the_workers_alive(pair):
    @by_value
    def refuse(session):
        from shardplan.errors import CheckpointError

        raise CheckpointError("torn", ["details"], ["hint"])

    with pytest.raises(CheckpointError, match="torn"):
        pair.call(refuse)
    assert pair.call(lambda session: session.rank) == [0, 1]


def test_an_unpicklable_argument_is_refused_before_anything_is_sent(pair):
    with pytest.raises(TypeError):
        pair.call(lambda session, x: x, threading.Lock())
    assert pair.call(lambda session: session.rank) == [0, 1]


def test_no_shared_memory_files(pair):
    before = set(os.listdir("/dev/shm"))
    pair.call(lambda session, x: x + 1, torch.zeros(1 << 18))
    assert set(os.listdir("/dev/shm")) <= before


# -- failures ----------------------------------------------------------------------------------------------------------


@by_value
def fail_on_one(session):
    if session.rank == 1:
        raise ZeroDivisionError("on purpose\nsecond line")
    dist.all_reduce(torch.ones(1))


@by_value
def kill_one(session):
    import os
    import signal

    if session.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


@by_value
def exit_one(session):
    import os

    if session.rank == 0:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    "function, rank, words",
    [
        (fail_on_one, 1, ["rank 1 raised ZeroDivisionError: on purpose", "Traceback", "in fail_on_one", "second line"]),
        (kill_one, 1, ["rank 1 was killed by signal 9 (SIGKILL)"]),
        (exit_one, 0, ["rank 0 exited with status 7"]),
    ],
)
def test_one_failure_ends_the_job_and_names_its_rank(function, rank, words):
    workers = Workers(["cpu", "cpu"])
    workers.wait_ready()
    pids = workers.pids
    started = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        workers.call(function)
    assert time.monotonic() - started < 15
    assert caught.value.rank == rank
    for word in words:
        assert word in str(caught.value)
    assert workers.closed
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(UsageError, match="closed"):
        workers.call(fail_on_one)


def test_a_late_worker_is_an_error_and_is_ended():
    workers = Workers(["cpu", "cpu"])
    workers.wait_ready()
    with pytest.raises(WorkerTimeout, match=r"rank 1 did not answer within 0\.5 s"):
        workers.call(lambda session: session.rank and __import__("time").sleep(60), timeout_seconds=0.5)
    assert workers.closed


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerFailed, match="exited with status 1"):
        Workers(["cpu"]).wait_ready()


def script(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment)


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_driver(tmp_path, end):
    driver = script(
        tmp_path,
        """
        import signal, time
        from shardplan.runtime.launch import Workers
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have it ignored
        workers = Workers(["cpu", "cpu"])
        workers.wait_ready()
        print(*workers.pids, flush=True)
        workers.call(lambda session: __import__("time").sleep(60))
        """,
    )
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.2)
    driver.send_signal(end)
    assert gone(pids, 10)
    driver.wait(10)
    driver.stdout.close()


def test_a_script_needs_no_main_guard_and_no_close(tmp_path):
    driver = script(
        tmp_path,
        """
        from shardplan.runtime.launch import Workers
        print("once")
        def where(session):
            return session.rank
        workers = Workers(["cpu"])
        print(workers.call(where), *workers.pids)
        """,
    )
    output, _ = driver.communicate(timeout=60)
    lines = output.split("\n")
    assert driver.returncode == 0 and lines[0] == "once" and lines[1].startswith("[0] ")
    assert gone([int(lines[1].split()[-1])], 10)


def test_mixed_devices_are_refused():
    with pytest.raises(UsageError):
        Workers(["cpu", "cuda:0"])
