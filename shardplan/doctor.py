"""``shardplan doctor``: what on this machine would keep a job from running, or make it slow, and what to do about it.

Every check is a function that returns one `Finding`; none of them changes anything. A check that itself fails is a
finding too, so that one broken library does not hide the others.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

OK, WARN, FAIL = "ok", "warning", "problem"
SCHEMA = 1
_OLDEST_TORCH, _FIRST_UNKNOWN_TORCH = (2, 11), (2, 14)
_FEW_FILES = 4096
_SMALL_SHARED_NBYTES = 1 << 30
_SMALL_CACHE_NBYTES = 256 << 20
_MEETING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """check: its name. level: "ok", "warning" (runs, but slowly or not everywhere) or "problem" (something will not
    run). found: what is there. advice: what to do, empty where all is well."""

    check: str
    level: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which a job would meet the troubles."""
    return [_safely(name, check) for name, check in CHECKS.items()]


def failed(findings: Sequence[Finding]) -> bool:
    """Whether something will not run."""
    return any(finding.level == FAIL for finding in findings)


def to_json(findings: Sequence[Finding]) -> str:
    """One object: ``{"schema", "ok", "findings": [{"check", "level", "found", "advice"}]}``."""
    data = {"schema": SCHEMA, "ok": not failed(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(data, indent=1)


def print_findings(findings: Sequence[Finding]) -> None:
    """On the terminal, one line each, advice beneath."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    marks = {OK: ("ok     ", "green"), WARN: ("warning", "yellow"), FAIL: ("problem", "red")}
    for finding in findings:
        mark, colour = marks[finding.level]
        console.print(Text.assemble((mark, colour), f"  {finding.check}: {finding.found}"))
        if finding.advice:
            console.print(Text(f"         {finding.advice}"))
    bad = [finding for finding in findings if finding.level != OK]
    console.print("nothing to mend" if not bad else f"{len(bad)} of {len(findings)} checks want attention")


def _safely(name: str, check: Callable[[], tuple[str, str, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except Exception as error:  # the machine may be broken in ways that nobody thought of
        return Finding(name, WARN, f"could not be checked: {type(error).__name__}: {error}")


# -- software ----------------------------------------------------------------------------------------------------------


def _python() -> tuple[str, str, str]:
    found = f"{platform.python_version()} at {sys.executable}"
    return OK, found, ""


def _torch() -> tuple[str, str, str]:
    try:
        import torch
    except Exception as error:
        return FAIL, f"cannot be imported: {type(error).__name__}: {error}", "pip install torch"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({built})"
    if version < _OLDEST_TORCH:
        return FAIL, found, f"install torch {'.'.join(map(str, _OLDEST_TORCH))} or newer"
    if version >= _FIRST_UNKNOWN_TORCH:
        return WARN, found, "newer than any version that shardplan is tested with"
    return OK, found, ""


def _backends() -> tuple[str, str, str]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return FAIL, "torch.distributed is not built in", "install a build of torch with distributed support"
    there = [
        name for name, is_there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if is_there
    ]
    found = ", ".join(there) or "none"
    if torch.cuda.is_available() and "nccl" not in there:
        return FAIL, found, "GPUs need NCCL: install the CUDA build of torch"
    if "gloo" not in there:
        return FAIL, found, "ranks on CPUs need gloo: install a build of torch that has it"
    return OK, found, ""


def _solvers() -> tuple[str, str, str]:
    import pulp

    highs = importlib.util.find_spec("highspy") is not None
    cbc = "PULP_CBC_CMD" in pulp.listSolvers(onlyAvailable=True)
    found = ", ".join(name for name, is_there in (("HiGHS", highs), ("CBC", cbc)) if is_there) or "none"
    if not highs and not cbc:
        return FAIL, found, "pip install highspy"
    if not highs:
        return WARN, found, "pip install highspy: it is the default solver, and faster"
    return OK, found, ""


def _transformers() -> tuple[str, str, str]:
    try:
        return OK, importlib.metadata.version("transformers"), ""
    except importlib.metadata.PackageNotFoundError:
        return WARN, "not installed", "hf: targets need it: pip install transformers"


# -- machine -----------------------------------------------------------------------------------------------------------


def _processor() -> tuple[str, str, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    found = f"{usable} of {os.cpu_count()} cores" + (f", limited to the time of {quota:.2g}" if quota else "")
    if quota and quota < usable:
        return WARN, found, "ranks on CPUs share this time: start no more than it allows"
    return OK, found, ""


def _cpu_quota() -> float | None:
    """Cores' worth of time that a control group allows, or None."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _open_files() -> tuple[str, str, str]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FEW_FILES:
        return (
            WARN,
            f"{soft} a process",
            f"ulimit -n {_FEW_FILES if hard < 0 else min(hard, 65536)}: each peer takes some",
        )
    return OK, f"{soft} a process", ""


def _shared_memory() -> tuple[str, str, str]:
    from shardplan.planner.report.words import nbytes_text

    path = Path("/dev/shm")
    if not path.is_dir():
        return OK, "no /dev/shm on this system", ""
    free = shutil.disk_usage(path).free
    if free < _SMALL_SHARED_NBYTES:
        return (
            WARN,
            f"{nbytes_text(free)} free in /dev/shm",
            "NCCL and data loaders use it; containers: --shm-size=8g",
        )
    return OK, f"{nbytes_text(free)} free in /dev/shm", ""


def _memory_lock() -> tuple[str, str, str]:
    import resource

    import torch

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    if torch.cuda.is_available() and soft != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        return WARN, found, "ulimit -l unlimited: InfiniBand registers memory, and NCCL falls back to sockets without"
    return OK, found, ""


def _cache() -> tuple[str, str, str]:
    import platformdirs

    from shardplan.planner.costs.store import ENVIRONMENT
    from shardplan.planner.report.words import nbytes_text

    if os.environ.get(ENVIRONMENT) == "":
        return WARN, f"switched off by {ENVIRONMENT}", "every plan measures anew"
    folder = Path(os.environ.get(ENVIRONMENT) or platformdirs.user_cache_dir("shardplan", appauthor=False))
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        return WARN, f"{folder} cannot be written", f"set {ENVIRONMENT}: without a cache every plan measures anew"
    free = shutil.disk_usage(there).free
    if free < _SMALL_CACHE_NBYTES:
        return WARN, f"{folder}: {nbytes_text(free)} free", "measurements may not be kept"
    return OK, f"{folder}, {nbytes_text(free)} free", ""


def _scratch() -> tuple[str, str, str]:
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    return OK, tempfile.gettempdir(), ""


# -- network -----------------------------------------------------------------------------------------------------------


def _host_name() -> tuple[str, str, str]:
    """gloo listens on the address that the host's own name stands for; where that is not an address of this machine,
    ranks wait for one another until they time out."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return WARN, f"{name} stands for no address", "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        return FAIL, f"{name} is {address}, which is not this machine", "mend /etc/hosts, or set GLOO_SOCKET_IFNAME"
    return OK, f"{name} is {address}", ""


def _ports() -> tuple[str, str, str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.create_connection(listener.getsockname(), timeout=2):
            listener.accept()[0].close()
    master = os.environ.get("MASTER_PORT")
    if master and os.environ.get("MASTER_ADDR") in (None, "localhost", "127.0.0.1") and os.environ.get("RANK") is None:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", int(master)))
            except OSError:
                return WARN, f"MASTER_PORT {master} is taken", "choose another, or let torchrun choose"
    return OK, "a connection to this machine works", ""


def _interfaces() -> tuple[str, str, str]:
    wanted = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(name)]
    there = [name for _, name in socket.if_nameindex()]
    for name in wanted:
        for interface in os.environ[name].lstrip("^=").split(","):
            if not os.environ[name].startswith("^") and not any(one.startswith(interface) for one in there):
                return FAIL, f"{name}={os.environ[name]}", f"there is no such interface: {', '.join(there)}"
    return OK, ", ".join(there), ""


def _meeting() -> tuple[str, str, str]:
    """Two ranks, as threads of this process, meet over the interface that gloo takes, and sum a tensor."""
    import torch
    import torch.distributed as dist

    store, size = dist.HashStore(), 1 << 18  # pyright: ignore[reportPrivateImportUsage]
    seen: list[float | Exception] = []

    def rank(number: int) -> None:
        try:
            group: Any = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=_MEETING_SECONDS))
            tensor = torch.ones(size)
            group.allreduce([tensor]).wait()  # connects
            started = time.perf_counter()
            group.allreduce([tensor]).wait()
            seen.append(time.perf_counter() - started if bool((tensor == 4).all()) else ArithmeticError("wrong sums"))
        except Exception as error:
            seen.append(error)

    ranks = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(2 * _MEETING_SECONDS)
    wrong = [str(found) for found in seen if isinstance(found, Exception)]
    if wrong or len(seen) < 2:
        advice = "mend /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface that is up; a firewall may be in the way"
        return FAIL, f"two ranks do not meet: {' '.join(wrong[0].split())[:160] if wrong else 'no answer'}", advice
    seconds = max(found for found in seen if isinstance(found, float))
    return OK, f"two ranks summed 1 MiB in {seconds * 1e3:.1f} ms over gloo", ""


# -- GPUs --------------------------------------------------------------------------------------------------------------


def _gpus() -> tuple[str, str, str]:
    import torch

    from shardplan.planner.report.words import nbytes_text

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").is_file():
            return (
                FAIL,
                "there is a driver, but torch sees no GPU",
                "install the CUDA build of torch; look at nvidia-smi",
            )
        return OK, "none: ranks run on CPUs", ""
    words, taken = [], []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        words.append(f"{torch.cuda.get_device_name(index)} ({nbytes_text(free)} of {nbytes_text(total)} free)")
        if free < 0.9 * total:
            taken.append(str(index))
    found = "; ".join(words)
    if taken:
        return WARN, found, f"memory of device {', '.join(taken)} is in use: nvidia-smi shows by whom"
    return OK, found, ""


def _nccl() -> tuple[str, str, str]:
    """All GPUs of this machine sum a tensor, from this process."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return OK, "no GPU", ""
    from torch.cuda import nccl

    tensors = [torch.ones(1 << 18, device=f"cuda:{index}") for index in range(count)]
    advice = "run it again with NCCL_DEBUG=INFO; containers need --ipc=host or a larger /dev/shm"
    try:
        nccl.all_reduce(tensors)
        sums = {float(tensor.mean()) for tensor in tensors}
    except RuntimeError as error:
        return FAIL, f"all-reduce failed: {' '.join(str(error).split())[:160]}", advice
    if sums != {float(count)}:
        return FAIL, f"all-reduce of {count} GPUs gave {sorted(sums)}", advice
    return OK, f"{count} GPUs summed 1 MiB, NCCL {'.'.join(map(str, nccl.version()))}", ""


def _peer_access() -> tuple[str, str, str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return OK, "fewer than two GPUs", ""
    blocked = [
        f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if blocked:
        advice = "messages go through the host's memory: check NVLink bridges, and ACS in the firmware or hypervisor"
        return WARN, f"not between {', '.join(blocked[:8])}", advice
    return OK, f"between all {count}", ""


def _clocks() -> tuple[str, str, str]:
    import torch

    if not torch.cuda.is_available():
        return OK, "no GPU", ""
    if importlib.util.find_spec("pynvml") is None:
        return OK, "not read (no NVML bindings)", ""
    slow = []
    for index in range(torch.cuda.device_count()):
        now, most = torch.cuda.clock_rate(index), _most_clock(index)
        if most and torch.cuda.utilization(index) > 50 and now < 0.7 * most:
            slow.append(f"device {index}: {now} of {most} MHz under load")
    if slow:
        return WARN, "; ".join(slow), "throttled: check power limit and cooling (nvidia-smi -q -d PERFORMANCE)"
    return OK, "not throttled", ""


def _most_clock(index: int) -> int:
    import pynvml  # type: ignore[import-not-found]

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))
    finally:
        pynvml.nvmlShutdown()


def _threads() -> tuple[str, str, str]:
    import torch

    given = os.environ.get("OMP_NUM_THREADS")
    found = (
        f"OMP_NUM_THREADS={given}" if given else f"OMP_NUM_THREADS is not set, torch takes {torch.get_num_threads()}"
    )
    if given and not given.isdigit():
        return WARN, found, "give a number"
    return OK, found, ""


CHECKS: dict[str, Callable[[], tuple[str, str, str]]] = {
    "python": _python,
    "torch": _torch,
    "collectives": _backends,
    "solvers": _solvers,
    "transformers": _transformers,
    "processor": _processor,
    "threads": _threads,
    "open files": _open_files,
    "shared memory": _shared_memory,
    "locked memory": _memory_lock,
    "temporary files": _scratch,
    "cache": _cache,
    "host name": _host_name,
    "ports": _ports,
    "interfaces": _interfaces,
    "ranks": _meeting,
    "GPUs": _gpus,
    "NCCL": _nccl,
    "peer access": _peer_access,
    "GPU clocks": _clocks,
}
