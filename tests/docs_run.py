"""Runs what the documentation shows: every code block of every page, in order, in one folder and one namespace a page.

    python -m tests.docs_run [PAGE ...]

A block after a line such as "`model.py`:" is written to that file. Python blocks are executed; in other blocks the
lines that begin with ``shardplan`` are run and have to end with status 0. `SETUP` gives a page what its text takes for
granted. Blocks that only show text (a message, make targets, installation) are listed in `SHOWN` by their beginning.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in ("errors.md", "zoo.md", "api.md"))
"""errors.md is made by running its examples, zoo.md by the zoo, api.md from docstrings."""
SHOWN = ("make ", "pip install", "model.router is kept whole")

_JOB = """
import torch
from torch import nn
from torch.nn import functional as F
import shardplan as sp
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
x, y = torch.randn(16, 16), torch.randint(8, (16,))
batches = [(x, y)] * 3
batch = (x, y)
adamw = lambda params: torch.optim.AdamW(params, lr=3e-4)
"""
_SMALL_LLAMA = """
import json
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, use_cache=False)
LlamaForCausalLM(config).save_pretrained("llama-3-8b")
config.save_pretrained(".")
row = {"family": "gpt", "layers": 4, "hidden": 256, "heads": 4, "vocab": 1000, "seq_len": 128, "devices": "2xh100",
       "tp": 1, "pp": 1, "dp": 2, "micro_batch": 1, "global_batch": 4}
open("table.jsonl", "w").write(json.dumps(row) + "\\n")
"""
_TRAIN = """
import torch
from torch import nn


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
    return model, (torch.randn(16, 16), torch.randint(8, (16,))), nn.functional.cross_entropy
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """code: run before a page's blocks. files: written before. replace: what stands in a block -> what is run."""

    code: str = ""
    files: tuple[tuple[str, str], ...] = ()
    replace: tuple[tuple[str, str], ...] = ()


_LLAMA_BATCH = "batch = {n: torch.randint(64, (4, 16)) for n in ('input_ids', 'labels')}\n"
SETUP: dict[str, Setup] = {
    "README.md": Setup(_JOB + _SMALL_LLAMA + _LLAMA_BATCH, (), (("model, 8,", "model, 2,"),)),
    "exactness.md": Setup(files=(("train.py", _TRAIN),)),
    "large_models.md": Setup("def make():\n    from torch import nn\n    return nn.Linear(8, 8)\n"),
    "resuming.md": Setup(
        _JOB + "loss_fn = F.cross_entropy\ndataset = [(torch.randn(16), torch.randint(8, ())) for _ in range(64)]\n",
        (),
        (
            ("with pm:", "if True:"),
            ("10_000", "6"),
            ("% 500", "% 2"),
            ('"auto"', "2"),
            ("submit(x)", "submit(x[0])"),
            (' tensorboard="tb",', ""),
        ),
    ),
    "simulate.md": Setup(_SMALL_LLAMA + "import shardplan as sp\nsp.Cluster.parse('2xh100').save('mine.toml')\n"),
    "training.md": Setup(
        _JOB + "pm = sp.auto_parallel(model, 2, batch, F.cross_entropy, optimizer=adamw)\nparts = batches\n"
    ),
    "zero.md": Setup(
        _JOB,
        (),
        (
            ("model, 8, batch, optimizer=...", "model, 2, batch, F.cross_entropy, adamw"),
            ("model, 8, batch, c", "model, 2, batch, F.cross_entropy, adamw, c"),
            ("*.experts.*", "0.*"),
            ("*.norm.*", "2.*"),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Block:
    """language: as the fence says. file: to which the text is written, else empty."""

    language: str
    text: str
    file: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    at = 0
    named = ""
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            stop = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            found.append(Block(line[3:].strip(), "\n".join(lines[at + 1 : stop]) + "\n", named, at + 1))
            at, named = stop, ""
        elif line.strip():
            match = re.fullmatch(r"`([\w./]+\.(?:py|toml|json))`:", line.strip())
            named = match[1] if match else ""
        at += 1
    return found


def commands(text: str) -> list[list[str]]:
    """The ``shardplan`` lines of a block, without comments."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))[:1] == ["shardplan"]]


def run_page(page: Path) -> None:
    """Raises what a block raises, with the block's place."""
    setup = SETUP.get(page.name, Setup())
    before, path = os.getcwd(), list(sys.path)
    with tempfile.TemporaryDirectory(prefix="shardplan-docs-") as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            for name, text in setup.files:
                Path(name).write_text(textwrap.dedent(text))
            namespace: dict[str, object] = {"__name__": "page"}
            exec(compile(setup.code, f"setup of {page.name}", "exec"), namespace)
            for block in blocks(page):
                if block.text.startswith(SHOWN):
                    continue
                try:
                    _run(block, namespace, setup, page)
                except BaseException as error:
                    error.add_note(f"in the block at line {block.line} of {page.relative_to(ROOT)}")
                    raise
        finally:
            os.chdir(before)
            sys.path[:] = path
            for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(folder)]:
                del sys.modules[name]


def _run(block: Block, namespace: dict[str, object], setup: Setup, page: Path) -> None:
    text = block.text
    for old, new in setup.replace:
        text = text.replace(old, new)
    if block.file:
        Path(block.file).write_text(text)
    elif block.language == "python":
        exec(compile("\n" * block.line + text, str(page), "exec"), namespace)
    else:
        for words in commands(text):
            command = [sys.executable, "-m", "shardplan", *words[1:]]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            if done.returncode:
                raise AssertionError(f"{shlex.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> int:
    names = sys.argv[1:]
    failures = 0
    for page in [ROOT / "README.md", *PAGES]:
        if names and page.name not in names:
            continue
        started = time.monotonic()
        try:
            run_page(page)
        except Exception as error:
            failures += 1
            print(
                f"{page.name}: {type(error).__name__}: {error}\n{' '.join(getattr(error, '__notes__', []))}", flush=True
            )
        else:
            print(f"{page.name}: {len(blocks(page))} blocks in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
