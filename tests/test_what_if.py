"""`shardplan plan --what-if`: variants are searched anew, and one that has no plan says why."""

import json

import pytest

from shardplan import cli, what_if
from shardplan.errors import UsageError

TARGET = "tests/targets.py:mlp"


@pytest.mark.parametrize(
    "now, value, expected",
    [
        ("8xh100", "16", "16xh100"),
        ("dgx-h100:2", "4", "dgx-h100:4"),
        ("cpu:2", "4", "cpu:4"),
        ("2", "4", "4"),
        ("8xh100", "4xa100-80g", "4xa100-80g"),
    ],
)
def test_a_number_keeps_the_kind_of_devices(now, value, expected):
    assert what_if.devices_text(now, value) == expected


@pytest.mark.parametrize(
    "text", ["devices", "devices=", "colour=red", "batch=none", "batch=0", "links=-1", "links=fast"]
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError):
        what_if.parse([text])


def test_devices_of_a_file_have_no_count():
    with pytest.raises(UsageError, match="has no count"):
        what_if.devices_text("cluster.toml", "4")


def test_variants_are_planned_and_reported(capsys, tmp_path):
    page = tmp_path / "report.html"
    others = ["--what-if", "devices=1,4", "--what-if", "links=0.01", "--what-if", "memory=1 KiB"]
    status = cli.run(["plan", TARGET, "--devices", "2xh100", *others, "--json", "--html", str(page)])
    data = json.loads(capsys.readouterr().out)
    assert status == 0
    found = {(w["setting"], w["value"]): w for w in data["what_if"]}
    assert list(found) == [("devices", "1"), ("devices", "4"), ("links", "0.01"), ("memory", "1 KiB")]
    for key in (("devices", "1"), ("devices", "4"), ("links", "0.01")):
        assert found[key]["step_seconds"] > 0 and found[key]["degrees"] and not found[key]["reason"]
    assert found["links", "0.01"]["step_seconds"] >= data["step_seconds"]
    assert found["memory", "1 KiB"]["step_seconds"] is None and "does not fit" in found["memory", "1 KiB"]["reason"]
    text = page.read_text()
    assert "What if" in text and "does not fit" in text
