"""Requests in batches: answers, waiting, refusals, failures, shutdown."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from shardplan import errors
from shardplan.serving import Followers, Server
from tests import jobs
from tests.test_faults import torchrun


class Ranks:
    """Ranks that are not there: a call runs here."""

    in_place = False
    hint = staticmethod(list)
    alive = True

    def call(self, function, *arguments):
        raise AssertionError("nothing to call")

    def load(self, job, supply):
        raise AssertionError("nothing to load")

    def close(self):
        pass


class Model:
    """Doubles its rows; waits for `gate` before each batch; remembers what it was given."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[torch.Tensor] = []
        self.error: Exception | None = None

    def __call__(self, call):
        (x,), _ = call
        assert self.gate.wait(20)
        self.batches.append(x)
        if x.dtype == torch.int64:
            raise errors.InputMismatch("planned for float32")
        if self.error is not None:
            raise self.error
        return {"double": 2 * x, "shared": torch.tensor(7.0)}


def serve(model: Model, **settings) -> Server:
    settings = {"sizes": (2, 4), "max_wait_seconds": 5.0, "max_queue": 100, "ended": lambda: None, **settings}
    return Server(Followers(Ranks(), model), **settings)


def test_requests_are_batched_padded_and_answered_in_their_own_rows():
    model = Model()
    with serve(model) as server:
        done: list[float] = []
        futures = [server.submit(torch.full((3,), float(i)), callback=lambda f: done.append(1.0)) for i in range(7)]
        server.close()  # the last three need not wait for a fourth
        for index, future in enumerate(futures):
            found = future.result(10)
            assert torch.equal(found["double"], torch.full((3,), 2.0 * index)) and found["shared"] == 7.0
    assert [len(batch) for batch in model.batches] == [4, 4] and torch.equal(model.batches[1][2], model.batches[1][3])
    stats = server.stats()
    assert (stats.answered, stats.batches, stats.mean_batch, stats.padding) == (7, 2, 3.5, 1 / 8)
    assert len(done) == 7 and stats.seconds[50] <= stats.seconds[99]
    with pytest.raises(errors.UsageError, match="closed"):
        server.submit(torch.zeros(3))


def test_shapes_are_not_mixed_and_a_bad_request_fails_alone():
    model = Model()
    with serve(model, max_wait_seconds=0.0) as server:
        model.gate.clear()
        futures = [server.submit(x) for x in (torch.zeros(3), torch.zeros(5), torch.zeros(3).long(), torch.ones(3))]
        model.gate.set()
        assert futures[1].result(10)["double"].shape == (5,)
        assert futures[3].result(10)["double"].tolist() == [2, 2, 2]
        with pytest.raises(errors.InputMismatch):
            futures[2].result(10)
        assert server(torch.ones(3))["double"].tolist() == [2, 2, 2]
    assert server.stats().failed == 1


def test_a_full_queue_refuses_or_makes_wait():
    model = Model()
    model.gate.clear()
    with serve(model, sizes=(1,), max_queue=2, max_wait_seconds=0.0) as server:
        first = server.submit(torch.zeros(1))
        while server.stats().queued:
            pass  # until the engine has taken it
        waiting = [server.submit(torch.zeros(1)) for _ in range(2)]
        with pytest.raises(errors.Overloaded, match="2 requests wait"):
            server.submit(torch.zeros(1), timeout_seconds=0)
        threading.Timer(0.1, model.gate.set).start()
        assert server.submit(torch.zeros(1), timeout_seconds=20).result(10)
        assert first.result(10) and all(future.result(10) for future in waiting)
    assert server.stats().refused == 1


def test_closing_without_draining_cancels_what_waits():
    model = Model()
    model.gate.clear()
    server = serve(model, sizes=(1,), max_wait_seconds=0.0)
    futures = [server.submit(torch.zeros(1)) for _ in range(4)]
    while server.stats().queued == 4:
        pass
    threading.Timer(0.1, model.gate.set).start()
    server.close(drain=False)
    assert futures[0].result(10) and all(future.cancelled() for future in futures[1:])


def test_a_failure_of_the_ranks_fails_everything_and_says_so():
    model, ended = Model(), threading.Event()
    model.gate.clear()
    model.error = errors.WorkerFailed("rank 1 was killed")
    server = serve(model, sizes=(1,), max_wait_seconds=0.0, ended=ended.set)
    futures = [server.submit(torch.zeros(1)) for _ in range(3)]
    model.gate.set()
    for future in futures:
        with pytest.raises(errors.WorkerFailed):
            future.result(10)
    assert ended.wait(10)
    with pytest.raises(errors.UsageError, match="rank 1 was killed"):
        server.submit(torch.zeros(1))


def test_a_model_in_workers_answers_and_its_death_is_told():
    samples = jobs.Samples()
    with jobs.start(jobs.plan(pp=2)) as pm:
        expected = pm.eval()(samples.x[:4])
        with pm.train().engine(max_batch=8, max_wait_ms=200.0, sizes=(4,)) as server:
            futures = [server.submit(x) for x in samples.x[:4]]
            found = torch.stack([future.result(60) for future in futures])
            assert torch.allclose(found, expected, atol=1e-6)
            with pytest.raises(errors.UsageError, match="answers requests"):
                pm(samples.x[:4])
        assert pm._model.training
        jobs.train(pm, 1)
        with pm.engine(max_batch=2) as server:
            os.kill(pm._planned.ranks.workers.pids[1], signal.SIGKILL)  # type: ignore[union-attr]
            with pytest.raises(errors.WorkerFailed, match="SIGKILL"):
                server(samples.x[0])


def test_rank_0_serves_under_torchrun(tmp_path):
    plan = tmp_path / "plan.json"
    jobs.plan(dp=2).save(plan)
    status, output, _ = torchrun(
        tmp_path,
        f"""
        import os, torch
        from tests import jobs
        with jobs.start({str(plan)!r}, "auto") as pm:
            x = jobs.Samples().x
            with pm.engine(max_batch=8, max_wait_ms=100.0) as engine:
                if os.environ["RANK"] == "0":
                    found = torch.stack([f.result(60) for f in [engine.submit(row) for row in x[:5]]])
                else:
                    engine.serve()
            expected = pm.eval()(x[:8])
            if os.environ["RANK"] == "0":
                print("SAME" if torch.allclose(found, expected[:5], atol=1e-6) else (found, expected))
        """,
    )
    assert status == 0 and "SAME" in output, output
