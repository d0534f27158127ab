"""The command line: flags, forms of output, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardplan import cli, cli_work
from shardplan.errors import ShardplanError, TargetError, UsageError
from shardplan.planner.plan import Plan
from shardplan.targets import load_target, parse_input

ROOT = Path(__file__).resolve().parent.parent
MLP = f"{ROOT / 'tests' / 'targets.py'}:mlp"
KEYS = {
    "schema", "model", "devices", "step_seconds", "tokens_per_second", "mfu", "stages", "microbatches", "schedule",
    "rematerialized", "peak_memory_bytes", "lower_bound_seconds", "gap", "solver", "trace_seconds", "profile_seconds",
    "solve_seconds", "baselines", "coverage", "replicated_ops", "discovered_ops",
}  # fmt: skip


@pytest.fixture
def command(capsys):
    """Run the command line in this process; -> exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A small Llama as a configuration file."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    path.write_text(json.dumps(settings))
    return path


# -- plan and report ---------------------------------------------------------------------------------------------------


def test_plan_prints_one_json_object_and_writes_files(command, config, tmp_path):
    out, html, trace = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "steps.json"
    status, stdout, _ = command(
        "plan", f"hf:{config}", "--devices", "4xh100", "--batch", 8, "--seq", 32, "--json", "-v",
        "-o", out, "--html", html, "--trace", trace,
    )  # fmt: skip
    assert status == 0
    data = json.loads(stdout)
    assert data.keys() >= KEYS
    assert data["schema"] == 1 and data["devices"] == 4 and data["model"] == "LlamaForCausalLM"
    assert data["stages"][0].keys() >= {"devices", "mesh", "blocks", "seconds", "memory_bytes"}
    assert data["stages"][0]["mesh"].keys() == {"dp", "tp"}
    assert data["tokens_per_second"] == pytest.approx(8 * 32 / data["step_seconds"])
    plan = Plan.load(out)
    assert plan.step_seconds == data["step_seconds"]
    assert "<html" in html.read_text() and "http://" not in html.read_text().replace("http://www.w3.org", "")
    assert json.loads(trace.read_text())["traceEvents"]
    status, stdout, _ = command("report", out, "--json")
    again = json.loads(stdout)
    same = KEYS - {"trace_seconds", "profile_seconds", "solve_seconds"}  # a plan file holds no clock readings
    assert status == 0 and {k: again[k] for k in same} == {k: data[k] for k in same}
    assert 0 < data["mfu"] < 1


def test_report_prints_and_explains(command, tmp_path):
    assert command("plan", MLP, "--devices", "2xh100", "--tp", 2, "-q", "-o", tmp_path / "tp.json") == (0, "", "")
    status, stdout, _ = command("report", tmp_path / "tp.json")
    assert status == 0 and "Splits" in stdout and "tp2" in stdout
    status, stdout, _ = command("report", tmp_path / "tp.json", "--explain", "0.weight")
    assert status == 0 and "tp/2" in stdout
    assert command("plan", MLP, "--devices", "2xh100", "--dp", 2, "-q", "-o", tmp_path / "dp.json")[0] == 0
    status, stdout, _ = command("diff", tmp_path / "tp.json", tmp_path / "dp.json")
    assert status == 0 and "tp2" in stdout and "dp2" in stdout


def test_flags_reach_the_planner(command, tmp_path):
    cluster = tmp_path / "cluster.toml"
    status, stdout, _ = command("cluster", "show", "2xa100-80g")
    cluster.write_text(stdout)
    assert status == 0
    arguments = ["--cluster", cluster, "--pp", 2, "--microbatches", 4, "--pin", "0.*=1", "--memory", "2 GiB,3 GiB"]
    status, _, err = command("plan", MLP, *arguments, "-q", "-o", tmp_path / "p.json")
    assert status == 3 and "pin('0.*', stage=1)" in err  # the first layer cannot be on the last stage alone
    arguments[7] = "2.*=1"
    assert command("plan", MLP, *arguments, "-q", "-o", tmp_path / "p.json")[0] == 0
    plan = Plan.load(tmp_path / "p.json")
    assert len(plan.stages) == 2 and plan.microbatches == 4
    assert [device.limit_nbytes for device in plan.devices] == [2 << 30, 3 << 30]
    assert {device.kind for device in plan.devices} == {"a100-80g"}
    assert "pin('2.*', stage=1)" in plan.constraints


# -- run ---------------------------------------------------------------------------------------------------------------


def test_run_trains_and_compares(command, tmp_path):
    html = tmp_path / "report.html"
    status, stdout, _ = command("run", MLP, "--devices", "cpu:2", "--dp", 2, "--steps", 4, "--lr", 0.1, "--html", html)
    assert status == 0
    losses = [float(line.split()[3]) for line in stdout.splitlines() if line.startswith("step ") and "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "step time: predicted" in stdout and "measured" in stdout and html.exists()


def test_run_with_random_inputs_and_a_plan_file(command, config, tmp_path):
    sizes = ["--devices", "cpu:2", "--batch", 4, "--seq", 16]
    assert command("plan", f"hf:{config}", *sizes, "--pp", 2, "-q", "-o", tmp_path / "plan.json")[0] == 0
    status, stdout, err = command(
        "run", f"hf:{config}", *sizes, "--plan", tmp_path / "plan.json", "--steps", 2, "--json"
    )
    assert status == 0, err
    data = json.loads(stdout)
    assert data["schema"] == 1 and len(data["losses"]) == 2 and "pp2" in data["degrees"]
    assert data["losses"][0] == pytest.approx(4.85, abs=0.5)


# -- targets and inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, words",
    [
        ("nothing", "cannot read target"),
        ("missing.py:make", "there is no file"),
        ("no.such.module:make", "cannot be imported"),
        (MLP.replace(":mlp", ":mpl"), "did you mean mlp"),
        (MLP.replace(":mlp", ":broken"), "raised RuntimeError: on purpose"),
        (MLP.replace(":mlp", ":data_parallel_plan"), "returned Plan"),
        ("hf:/nowhere.json", "cannot read"),
    ],
)
def test_targets_that_cannot_be_loaded(command, target, words):
    status, _, err = command("plan", target, "--devices", "2xh100")
    assert status == 2 and words in err and err.startswith("SP104 TargetError")
    with pytest.raises(TargetError):
        load_target(target)


def test_targets_of_every_form(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    by_file, by_module = load_target(MLP), load_target("tests.targets:mlp")
    assert type(by_file.model) is type(by_module.model) and by_file.loss_fn is by_module.loss_fn
    hf = load_target(f"hf:{config}", batch=4, seq=16)
    assert hf.example()["input_ids"].shape == (4, 16) and next(hf.model.parameters()).is_meta
    batch = load_target(f"hf:{config}", batch=4, seq=16, on_meta=False).random_batch(0)
    assert batch["input_ids"].min() >= 0 and 64 < batch["input_ids"].max() < 128
    given = load_target(MLP, ["input=float32[4, 8]", "target=int64[4]"])
    assert given.example()["input"].shape == (4, 8)
    with pytest.raises(UsageError, match="say nothing"):
        load_target(MLP, batch=4)


def test_inputs_are_read():
    assert parse_input("ids=int64[8,2048]") == ("ids", torch.int64, (8, 2048))
    assert parse_input("a.b=float32[]") == ("a.b", torch.float32, ())
    for text in ("ids", "ids=int64", "ids=no_type[2]", "ids=int64[a]", "=int64[2]"):
        with pytest.raises(UsageError, match="cannot read input"):
            parse_input(text)


# -- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["--version"], 0),
        (["plan", "--help"], 0),
        ([], 2),
        (["plan"], 2),
        (["no-such-command"], 2),
        (["plan", MLP, "--dp", "two"], 2),
        (["plan", MLP, "--devices", "7xunobtainium"], 2),
        (["plan", MLP, "--devices", "2xh100", "--pin", "x"], 2),
        (["plan", MLP, "--devices", "2xh100", "--solver", "abacus"], 2),
        (["plan", MLP, "--devices", "2xh100", "-q", "-o", "/no/such/folder/plan.json"], 2),
        (["run", MLP, "--steps", "0"], 2),
        (["cluster", "show", "nothing-like-it"], 2),
        (["cluster", "list"], 0),
        (["cluster", "detect"], 0),
    ],
)
def test_exit_statuses(command, arguments, status):
    assert command(*arguments)[0] == status


def test_a_bug_of_ours_exits_with_its_traceback(command, monkeypatch):
    def fail(job):
        raise KeyError("a bug")

    monkeypatch.setattr(cli_work, "make_plan", fail)
    status, _, err = command("plan", MLP)
    assert status == 1 and "Traceback" in err and "KeyError" in err and "bug in shardplan" in err


def test_every_error_has_its_exit_status(command, monkeypatch):
    def every(kind: type[ShardplanError]) -> list[type[ShardplanError]]:
        public = [child for child in kind.__subclasses__() if child.__module__ == kind.__module__]
        return [kind, *(sub for child in public for sub in every(child))]

    for kind in every(ShardplanError):

        def fail(job, kind=kind):
            raise kind("title", ["detail"], ["what helps"])

        monkeypatch.setattr(cli_work, "make_plan", fail)
        status, out, err = command("plan", MLP)
        assert (status, out) == (kind.exit_status, "")
        assert err == f"{kind.code} {kind.__name__}: title\n  detail\n  Hint: what helps\n"
    assert len({kind.code for kind in every(ShardplanError)}) == len(every(ShardplanError))


def test_as_a_module_and_as_a_console_script():
    for start in ([sys.executable, "-m", "shardplan"], [str(Path(sys.executable).with_name("shardplan"))]):
        found = subprocess.run([*start, "--version"], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert found.returncode == 0 and found.stdout.startswith("shardplan ")
