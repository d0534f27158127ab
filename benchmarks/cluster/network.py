"""Hosts as network namespaces, joined by the forwarder. Root only; touches no namespace but its own.

Namespaces are named after this process, so that `sweep` finds those that a killed run left behind.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from benchmarks.cluster import quota
from benchmarks.cluster.build import build
from benchmarks.cluster.links import Links
from benchmarks.cluster.quota import Quota

_PREFIX = "shardplan"
_MTU = 9000


def missing() -> str | None:
    """Why this machine cannot have an emulated network, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"needs {program} (package {package})"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        return "needs a C compiler (package gcc)"
    return None


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


class Network:
    """A context manager. spaces: names of the hosts' namespaces."""

    def __init__(self, links: Links, core: int | None = None, limit_seconds: int = 3600) -> None:
        """core: to which the forwarder is pinned. limit_seconds: after which it ends in any case."""
        self.spaces = [f"{_PREFIX}{os.getpid()}h{host}" for host in range(links.hosts)]
        self._file = Path(tempfile.mkstemp(prefix=f"{_PREFIX}-links-{os.getpid()}-")[1])
        self._forwarder: subprocess.Popen[str] | None = None
        sweep()
        self._first = Quota("forwarder")
        try:
            self._file.write_text(links.text())
            for space in self.spaces:
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
            pin = ["taskset", "-c", str(core)] if core is not None else []
            command = [*pin, str(build("forwarder")), str(self._file), str(limit_seconds), *self.spaces]
            self._forwarder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            self._first.add(self._forwarder.pid)
            assert self._forwarder.stdout is not None
            if self._forwarder.stdout.readline().strip() != "ready":
                raise RuntimeError("the forwarder did not start")
            for host in range(links.hosts):
                self._join(host)
        except BaseException:
            self.close()
            raise

    def _join(self, host: int) -> None:
        space = self.spaces[host]
        _ip("-n", space, "link", "set", "eth0", "address", _mac(host), "mtu", str(_MTU), "txqueuelen", "1000")
        _ip("-n", space, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        enter = ["nsenter", f"--net=/run/netns/{space}", "sysctl", "-qw"]
        settings = ["net.ipv4.tcp_slow_start_after_idle=0", "net.ipv6.conf.all.disable_ipv6=1"]
        subprocess.run([*enter, *settings], capture_output=True, check=False)
        route = ["dev", "eth0", "src", address(host), "congctl", "cubic", "initcwnd", "64"]
        _ip("-n", space, "route", "replace", "10.77.0.0/24", *route)
        for other in range(len(self.spaces)):
            if other != host:  # no ARP in the way of the first message
                neighbour = [address(other), "lladdr", _mac(other), "nud", "permanent", "dev", "eth0"]
                _ip("-n", space, "neigh", "replace", *neighbour)

    def change(self, links: Links) -> None:
        """Other links between the same hosts, from now on."""
        assert self._forwarder is not None and links.hosts == len(self.spaces)
        draft = self._file.with_suffix(".new")
        draft.write_text(links.text())
        os.replace(draft, self._file)
        self._forwarder.send_signal(signal.SIGHUP)

    def enter(self, host: int) -> list[str]:
        """What to put before a command that is to run on a host."""
        return ["nsenter", f"--net=/run/netns/{self.spaces[host]}"]

    def close(self) -> None:
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.wait()
            self._forwarder = None
        self._first.close()
        for space in self.spaces:
            _ip("netns", "del", space, check=False)
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep() -> None:
    """Deletes what runs whose process is gone left behind: namespaces, control groups, files. Their ranks and their
    forwarder went with them."""
    quota.sweep()
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}-*"):
        found = re.match(rf"{_PREFIX}-(?:links|cluster)-(\d+)-", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        found = re.match(rf"({_PREFIX}(\d+)h\d+)\b", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            _ip("netns", "del", found[1], check=False)


def _mac(host: int) -> str:
    return f"02:77:00:00:00:{host + 1:02x}"


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
