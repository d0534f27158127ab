"""A worker process: ``python -m shardplan.runtime.worker SOCKET LIFELINE DRIVER_PID KERNEL_SIGNAL BOARD RANK``.

Started by `runtime.launch`; SOCKET, LIFELINE and BOARD are inherited file descriptors.

It answers one call at a time: a frame ``(function, arguments)`` runs as ``function(session, *arguments)``, and the
answer is ``("result", value)`` or ``("error", Failure)``. It dies with its driver. In its slot of the board, a file
that the driver reads, it says that it lives and at what place it is (`runtime.pulse`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from shardplan.errors import ShardplanError
from shardplan.runtime.messages import Channel, Closed, encode
from shardplan.runtime.pulse import BEAT_SECONDS, SLOT_NBYTES, Slot

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs before it can do anything.

    device: torch device of this rank ("cpu", "cuda:1"). backend: of torch.distributed. port: of the store on the
    loopback, served by rank 0 on the listening socket `listen_fd` (-1 elsewhere). timeout_seconds: of a collective.
    core: number of the core to stay on, or -1. path: the driver's sys.path.
    """

    rank: int
    world_size: int
    device: str
    backend: str
    port: int
    listen_fd: int
    timeout_seconds: float
    core: int
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """What a call raised. error: the exception itself if it is one of shardplan's, else None."""

    kind: str
    title: str
    traceback: str
    error: ShardplanError | None = None


@dataclass(slots=True)
class Session:
    """What stays in a rank between calls. values: whatever the functions that are called keep there. slot: its signs of
    life. watch: `runtime.watch.Watch` where no driver watches."""

    rank: int
    world_size: int
    device: str
    values: dict[str, Any] = field(default_factory=dict)
    slot: Slot = field(default_factory=Slot)
    watch: Any = None


def start_session(setup: Setup) -> Session:
    """Join the process group. Every rank calls it."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=setup.timeout_seconds)
    serves = setup.listen_fd >= 0
    store = TCPStore(
        "127.0.0.1",
        setup.port,
        setup.world_size,
        serves,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=setup.listen_fd if serves else None,
    )
    dist.init_process_group(
        setup.backend,
        store=store,
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=timeout,
        device_id=device if setup.backend == "nccl" else None,
    )
    session = Session(setup.rank, setup.world_size, setup.device)
    session.values["store"] = store
    return session


def main(arguments: Sequence[str]) -> None:
    """Serve calls until the driver closes the socket."""
    socket_fd, lifeline_fd, driver, kernel_signal, board_fd, rank = (int(text) for text in arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the driver's to handle
    if kernel_signal:
        _ask_for_death_signal()
    slot = _slot(board_fd, rank)
    threading.Thread(target=_live_with_driver, args=(lifeline_fd, driver, slot), daemon=True).start()
    channel = Channel(socket.socket(fileno=socket_fd))
    session: Session | None = None
    try:
        while True:
            try:
                message = channel.receive()
            except Closed:
                raise
            except Exception as error:  # what was sent cannot be rebuilt here, such as a module that is not found
                channel.send(("error", failure(error)))
                continue
            if isinstance(message, Setup):
                _prepare(message)
                answer = _answer(start_session, (message,))
                if answer[0] == "result":
                    answer[1].slot = slot
                    session, answer = answer[1], ("result", None)
            else:
                function, values = message
                slot.begin(getattr(function, "__name__", type(function).__name__))
                answer = _answer(function, (session, *values))
                if answer[0] == "result":
                    slot.end()  # else the place where it failed stays, to be told
            channel.send_frame(_encoded(answer))
    except Closed:
        pass
    # Leave without destructors: a process group whose peers are gone may wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _prepare(setup: Setup) -> None:
    sys.path[:] = [*setup.path, *(entry for entry in sys.path if entry not in setup.path)]
    if setup.core >= 0 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {setup.core})


def _answer(function: Any, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "result", function(*arguments)
    except BaseException as error:
        return "error", failure(error)


def _encoded(answer: tuple[str, Any]) -> list[memoryview]:
    try:
        return encode(answer)
    except Exception as error:
        return encode(("error", failure(error)))


def failure(error: BaseException) -> Failure:
    """An exception in a form that always travels."""
    title = str(error).strip().splitlines()
    return Failure(
        type(error).__name__,
        title[0] if title else "",
        "".join(traceback.format_exception(error)),
        error if isinstance(error, ShardplanError) else None,
    )


def _ask_for_death_signal() -> None:
    """Have the kernel end this process with its driver (Linux), for when no Python thread of ours gets to run."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _slot(board_fd: int, rank: int) -> Slot:
    board = mmap.mmap(board_fd, 0)
    os.close(board_fd)
    return Slot(memoryview(board)[rank * SLOT_NBYTES : (rank + 1) * SLOT_NBYTES])


def _live_with_driver(lifeline_fd: int, driver: int, slot: Slot) -> None:
    """Gives signs of life, and ends this process as soon as the driver has closed its end of the lifeline, by exit or
    by any death."""
    while os.getppid() == driver:
        slot.beat()
        if select.select([lifeline_fd], [], [], BEAT_SECONDS)[0] and not os.read(lifeline_fd, 1):
            break
    os._exit(1)


if __name__ == "__main__":
    # Pickles name this module by its import path, so the classes must come from there and not from __main__.
    from shardplan.runtime import worker

    worker.main(sys.argv[1:])
