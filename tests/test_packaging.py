"""The package as a whole: dependencies point one way, imports are late, and the wheel holds the code."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each layer may import itself, those below it, and shardplan.errors.
LAYERS = ("planner", "rewrite", "runtime")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def layer_files(layer: str) -> list[Path]:
    found = sorted((ROOT / layer).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_point_one_way(layer):
    allowed = {"errors", *LAYERS[: LAYERS.index(layer) + 1]}
    wrong = []
    for path in layer_files(layer):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] in LAYERS or (parts[0] == "shardplan" and parts[1:2] and parts[1] not in allowed):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong


@pytest.mark.parametrize("layer, banned", [("planner", "torch.distributed"), ("rewrite", "torch.distributed")])
def test_only_the_runtime_knows_process_groups(layer, banned):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in layer_files(layer)
        for line, name in imports(path)
        if name.startswith(banned)
    ]
    assert not wrong


def test_the_runtime_knows_no_solver():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in layer_files("runtime")
        for line, name in imports(path)
        if name.split(".")[0] in ("pulp", "highspy") or ".planner.search" in name
    ]
    assert not wrong


@pytest.mark.parametrize(
    "code",
    [
        "import shardplan; dir(shardplan); shardplan.ShardplanError; shardplan.Cluster.preset('dgx-h100', nodes=2)",
        "import shardplan.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit as e: assert not e.code",
        "import shardplan.__main__ as m\ntry: m.main(['plan', '--help'])\nexcept SystemExit as e: assert not e.code",
    ],
)
def test_torch_is_imported_late(code):
    code += "\nimport sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_every_public_name_is_there():
    import shardplan

    for name in shardplan.__all__:
        assert getattr(shardplan, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shardplan.no_such_name


def test_the_wheel_holds_code_and_data(tmp_path):
    """All layers and their data files, under the one top-level name."""
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in (*LAYERS, "shardplan"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    out = tmp_path / "dist"
    out.mkdir()
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=copy, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"shardplan"}
    wanted = set()
    for name in (*LAYERS, "shardplan"):
        for path in (copy / name).rglob("*"):
            where = path.relative_to(copy).parts
            if path.is_file() and not (name == "shardplan" and where[1] in LAYERS):
                wanted.add("/".join(where if name == "shardplan" else ("shardplan", *where)))
    assert len(wanted) > 50
    assert not sorted(wanted - names)
