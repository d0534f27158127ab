"""The process that ops are tried in.

An op that is handed tensors that do not fit can bring its process down or hang in it. So it is tried in a child, which
is forked from this process, because only a fork knows the ops that a user's script has registered. The child is used
for many ops, says what it is about to run, so that a crash is held against that one trial only, is killed by an alarm
where a trial hangs, and ends by itself where it is not asked for a while or this process is gone.

A fork of a process that has run a backward on an accelerator cannot run one itself. Then the child is an interpreter of
its own, which knows the ops of torch and of the modules and libraries that it can load again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
from torch.utils import _python_dispatch

from shardplan.planner.rules.question import Question, target_of
from shardplan.planner.rules.trial import Answer, search

log = logging.getLogger(__name__)

TRIAL_SECONDS = 10.0
"""Of the processor, for which one op may be tried."""
HANG_SECONDS = 20
"""After which a process is killed in which one way to run an op does not come to an end."""
_IDLE_SECONDS = 20.0
_MOST_CRASHES = 6
_CANNOT_FORK = "fork-based multiprocessing"
"""What autograd says in a fork in which it cannot run."""


class _Gone(Exception):
    """The child went down; the message is what it ran last."""


class Laboratory:
    """Tries ops in a child, which is started when there is a first question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: tuple[int, Connection] | None = None
        self._fresh = False

    def answer(self, question: Question) -> Answer:
        """The ways to split this op. Never raises for what the op does."""
        crashed: list[str] = []
        with self._lock:
            while len(crashed) <= _MOST_CRASHES:
                try:
                    found = self._ask(question, tuple(crashed))
                    if found is not None and _CANNOT_FORK in found.reason and not self._fresh:
                        self._stop()
                        self._fresh = True
                        found = self._ask(question, tuple(crashed))
                    if found is None:  # registered after the child was forked
                        self._stop()
                        found = self._ask(question, tuple(crashed))
                    return found or Answer(reason="it is not registered")
                except _Gone as gone:
                    log.info("%s brought the trial down at %s", question.op, gone)
                    crashed.append(str(gone))
                except OSError as error:  # no process, no memory
                    return Answer(reason=f"no process to try it in: {error}")
        return Answer(reason=f"it brought {len(crashed)} trials down")

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._stop()

    def _ask(self, question: Question, crashed: tuple[str, ...]) -> Answer | None:
        """None where the child does not know the op. Raises _Gone."""
        connection = self._connection()
        running = "the start"
        try:
            connection.send((question, crashed))
            while True:
                message = connection.recv()
                if not isinstance(message, str):
                    return message
                running = message
        except (EOFError, ConnectionError) as error:
            self._stop()
            raise _Gone(running) from error

    def _connection(self) -> Connection:
        if self._child is not None:
            pid, connection = self._child
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    return connection
            connection.close()  # it went home
        mine, theirs = Pipe()
        if self._fresh:
            os.set_inheritable(theirs.fileno(), True)
            command = f"from {__name__} import serve_again; serve_again({theirs.fileno()}, {_loadable()!r})"
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            pid = os.posix_spawn(sys.executable, [sys.executable, "-c", command], environment)
            theirs.close()
            self._child = pid, mine
            return mine
        with warnings.catch_warnings():
            # The child runs one thread on what is its own; it takes no lock that another thread may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _serve(theirs)
        theirs.close()
        self._child = pid, mine
        return mine

    def _stop(self) -> None:
        if self._child is None:
            return
        pid, connection = self._child
        self._child = None
        connection.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _loadable() -> tuple[list[str], list[str]]:
    """(modules that define ops in Python, libraries that define them otherwise), for another interpreter to load."""
    from torch._library.custom_ops import OPDEFS

    modules = {op._init_fn.__module__ for op in OPDEFS.values()} - {"__main__"}
    return sorted(modules), sorted(torch.ops.loaded_libraries)


def serve_again(descriptor: int, loadable: tuple[list[str], list[str]]) -> None:
    """What the interpreter of its own runs. Never returns."""
    modules, libraries = loadable
    for load, names in ((importlib.import_module, modules), (torch.ops.load_library, libraries)):
        for name in names:
            # An op that cannot be loaded again is not registered there, and the answer says so.
            with contextlib.suppress(Exception):
                load(name)
    _serve(Connection(descriptor))


def _serve(connection: Connection) -> None:
    """Answer questions until nobody asks. Never returns."""
    try:
        _settle(connection)
        while connection.poll(_IDLE_SECONDS):
            question, crashed = connection.recv()
            connection.send(_answer(connection, question, crashed))
            signal.alarm(0)
    finally:
        os._exit(0)


def _answer(connection: Connection, question: Question, crashed: tuple[str, ...]) -> Answer | None:
    try:
        target = target_of(question)
    except AttributeError:
        return None

    def mark(place: str) -> bool:
        if place in crashed:
            return False
        connection.send(place)
        signal.alarm(HANG_SECONDS)
        return True

    # Whatever the process that was forked was in the middle of.
    with (
        _python_dispatch._disable_current_modes(), torch.inference_mode(False), torch.enable_grad(),
        torch.autocast("cpu", enabled=False), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        return search(target, question, mark, TRIAL_SECONDS)


def _settle(connection: Connection) -> None:
    """Keep nothing of the parent's that a child must not use or hold open."""
    gc.disable()  # finalizers of the parent's objects
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    torch.set_num_threads(1)
    torch.set_default_device("cpu")
