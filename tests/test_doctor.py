"""`shardplan doctor`: each trouble that can be staged on any machine is found, and named with what to do."""

import json
import resource
import socket
import sys
from types import SimpleNamespace

import pytest

from shardplan import cli, doctor


def level(name: str) -> tuple[str, str, str]:
    finding = next(f for f in doctor.examine() if f.check == name)
    return finding.level, finding.found, finding.advice


def test_every_check_answers_and_the_command_prints_them(capsys):
    findings = doctor.examine()
    assert [f.check for f in findings] == list(doctor.CHECKS)
    assert all(f.found and f.level in (doctor.OK, doctor.WARN, doctor.FAIL) for f in findings)
    assert all(bool(f.advice) == (f.level != doctor.OK) for f in findings if "could not be checked" not in f.found)
    status = cli.run(["doctor"])
    shown = capsys.readouterr().out
    assert status == (7 if doctor.failed(findings) else 0)
    assert all(name in shown for name in doctor.CHECKS)


def test_json_is_one_object(capsys):
    cli.run(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == doctor.SCHEMA and {f["check"] for f in data["findings"]} == set(doctor.CHECKS)


def test_a_problem_ends_with_status_7(monkeypatch, capsys):
    monkeypatch.setitem(doctor.CHECKS, "ports", lambda: (doctor.FAIL, "no", "do this"))
    assert cli.run(["doctor"]) == 7
    assert "do this" in capsys.readouterr().out


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("out of order")

    monkeypatch.setitem(doctor.CHECKS, "GPUs", broken)
    assert level("GPUs")[:2] == (doctor.WARN, "could not be checked: RuntimeError: out of order")


def test_a_host_name_of_another_machine(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.1")  # an address of documentation: nobody's
    found = level("host name")
    assert found[0] == doctor.FAIL and "192.0.2.1" in found[1] and "/etc/hosts" in found[2]


def test_a_host_name_without_address(monkeypatch):
    def unknown(name):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert level("host name")[0] == doctor.WARN


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch7")
    assert level("interfaces")[0] == doctor.FAIL
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert level("interfaces")[0] == doctor.OK


def test_a_port_in_use(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(1)
        monkeypatch.setenv("MASTER_PORT", str(busy.getsockname()[1]))
        assert level("ports")[0] == doctor.WARN


def test_a_cache_that_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDPLAN_CACHE", "")
    assert level("cache")[0] == doctor.WARN
    monkeypatch.setenv("SHARDPLAN_CACHE", str(tmp_path / "deep" / "folder"))
    assert level("cache")[0] == doctor.OK
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in level("cache")[1]


def test_few_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    found = level("open files")
    assert found[0] == doctor.WARN and "ulimit -n 1024" in found[2]


def test_versions_of_torch(monkeypatch):
    import torch

    for version, expected in (("2.10.1", doctor.FAIL), ("2.11.0+cu130", doctor.OK), ("2.99.0", doctor.WARN)):
        monkeypatch.setattr(torch, "__version__", version)
        assert level("torch")[0] == expected


def test_no_solver(monkeypatch):
    import pulp

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert level("solvers")[0] in (doctor.OK, doctor.WARN)  # CBC may be there
    monkeypatch.setattr(pulp, "listSolvers", lambda onlyAvailable=False: [])
    assert level("solvers")[0] == doctor.FAIL


def test_gpus_that_are_taken_or_cannot_talk(monkeypatch):
    import torch

    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: (10 << 30 if index else 79 << 30, 80 << 30),
        get_device_name=lambda index: "Card",
        can_device_access_peer=lambda a, b: False,
        clock_rate=lambda index: 500,
        utilization=lambda index: 99,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    found = level("GPUs")
    assert found[0] == doctor.WARN and "device 1" in found[2]
    found = level("peer access")
    assert found[0] == doctor.WARN and "0-1" in found[1]
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_most_clock", lambda index: 1980)
    assert "500 of 1980 MHz" in level("GPU clocks")[1]


def test_a_driver_without_a_usable_gpu(monkeypatch, tmp_path):
    real = doctor.Path
    (tmp_path / "version").write_text("driver")

    def path(text):
        return tmp_path / "version" if str(text) == "/proc/driver/nvidia/version" else real(text)

    monkeypatch.setattr(doctor, "Path", path)
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert level("GPUs")[0] == doctor.FAIL


@pytest.mark.parametrize("text, quota", [("max 100000", None), ("50000 100000", 0.5)])
def test_a_quota_of_the_processor(monkeypatch, tmp_path, text, quota):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    real = doctor.Path
    monkeypatch.setattr(doctor, "Path", lambda p: file if str(p).endswith("cpu.max") else real(p))
    assert doctor._cpu_quota() == quota
    assert level("processor")[0] == (doctor.WARN if quota else doctor.OK)


def test_ranks_that_do_not_meet_are_a_problem(monkeypatch):
    import torch.distributed as dist

    found, said, _ = level("ranks")
    assert found == doctor.OK and "over gloo" in said

    def refused(*arguments):
        raise RuntimeError("no\n  such interface")

    monkeypatch.setattr(dist, "ProcessGroupGloo", refused)
    found, said, advice = level("ranks")
    assert (found, said) == (doctor.FAIL, "two ranks do not meet: no such interface") and "GLOO_SOCKET_IFNAME" in advice
