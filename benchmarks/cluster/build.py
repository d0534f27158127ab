"""The two C parts, compiled on demand into the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import platformdirs

HERE = Path(__file__).parent
_FLAGS = {"forwarder": ["-O2"], "steady": ["-O2", "-shared", "-fPIC", "-ldl"]}


def build(name: str) -> Path:
    """The program or library of ``NAME.c``. Raises RuntimeError without a compiler, or with its words."""
    source = HERE / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    made = Path(platformdirs.user_cache_dir("shardplan-benchmarks", appauthor=False)) / f"{name}-{digest}"
    if made.exists():
        return made
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("the emulated cluster needs a C compiler (cc or gcc)")
    made.parent.mkdir(parents=True, exist_ok=True)
    draft = made.with_suffix(f".{os.getpid()}")
    done = subprocess.run([compiler, str(source), "-o", str(draft), *_FLAGS[name]], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} {source.name}:\n{done.stderr}")
    os.replace(draft, made)
    return made
