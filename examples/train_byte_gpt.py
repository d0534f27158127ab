"""Train a byte-level GPT on the documentation that ships with Python, on as many devices as there are.

    python examples/train_byte_gpt.py                                   # two CPU workers on this machine
    python examples/train_byte_gpt.py --devices 4                       # four devices of this machine
    torchrun --nproc-per-node 2 examples/train_byte_gpt.py --devices auto

The model and the training loop know nothing of devices: `shardplan.auto_parallel` traces the model, measures its parts
here, plans, and runs the plan. A copy on one device trains beside it for a few steps, to compare loss and speed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan.planner.report import render_terminal, write_report


class Block(nn.Module):
    """One transformer layer, pre-normalised, causal. x: [batch, seq, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (p.view(batch, seq, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """bytes: int64 [batch, seq] -> logits [batch, seq, 256] of the next byte."""

    def __init__(self, layers: int = 6, width: int = 384, heads: int = 6, seq: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(seq, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_byte_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class Text:
    """Random windows of the text, the same for the same step on every machine."""

    def __init__(self, batch: int, seq: int) -> None:
        data = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        self.data = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        self.batch, self.seq = batch, seq

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> inputs, targets: int64 [batch, seq]."""
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.data) - self.seq - 1, (self.batch,), generator=generator)
        rows = torch.stack([self.data[start : start + self.seq + 1] for start in starts.tolist()])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class OneDevice:
    """The same model, trained on one device as a script without shardplan would; the yardstick."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model = copy.deepcopy(model).to(device)
        self.optimizer = adamw(self.model.parameters())
        self.device = device
        self.seconds: list[float] = []

    def train_step(self, ids: torch.Tensor, target: torch.Tensor) -> float:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = next_byte_loss(self.model(ids.to(self.device)), target.to(self.device))
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        self.seconds.append(time.perf_counter() - started)
        return value


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--devices", default="cpu:2")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--seconds", type=float, default=90.0, help="stop training after this time (plain script)")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--seq", type=int, default=128)
    options.add_argument("--memory", help='limit per device, such as "200 MiB"')
    options.add_argument("--html", type=Path, default=Path("out/report.html"))
    chosen = options.parse_args()

    rank = int(os.environ.get("RANK", "0"))
    console = Console(stderr=False, quiet=rank > 0)
    torch.manual_seed(0)
    model = ByteGPT(seq=chosen.seq)
    text = Text(chosen.batch, chosen.seq)
    count = sum(p.numel() for p in model.parameters())
    console.print(
        f"byte GPT, {count / 1e6:.1f} M parameters; {len(text.data) / 1e3:.0f} kB of text; "
        f"{chosen.batch} x {chosen.seq} bytes a step"
    )
    alone = OneDevice(model, "cuda" if torch.cuda.is_available() and chosen.devices == "auto" else "cpu")

    with sp.auto_parallel(
        model,
        chosen.devices,
        example_inputs=text.at(0),
        loss_fn=next_byte_loss,
        optimizer=adamw,
        memory_limit=chosen.memory,
        verbose=rank == 0,
    ) as pm:
        if rank == 0:
            render_terminal(pm.plan, console)
        limit = chosen.seconds if "RANK" not in os.environ else float("inf")  # ranks must stop together
        seconds = train(pm, alone, text, chosen.steps, limit, console, rank)
        measured = pm.measure(text.at(0)[0], target=text.at(0)[1], steps=3)

    usual, single = statistics.median(seconds), statistics.median(alone.seconds or [0.0])
    if rank == 0:
        measured = replace(measured, step_seconds=usual, single_device_seconds=single, steps=len(seconds))
        chosen.html.parent.mkdir(parents=True, exist_ok=True)
        write_report(pm.plan, chosen.html, measured)
        console.print(
            f"step time: predicted {pm.plan.step_seconds * 1e3:.0f} ms, measured {usual * 1e3:.0f} ms; "
            f"one device {single * 1e3:.0f} ms: [bold]{single / usual:.2f} times as fast[/bold]"
        )
        console.print(f"report: {chosen.html}")


def train(
    pm: sp.ParallelModel, alone: OneDevice, text: Text, steps: int, limit: float, console: Console, rank: int
) -> list[float]:
    """At most `steps` steps, or `limit` seconds. -> seconds of the parallel steps, the first (warm-up) left out."""
    seconds: list[float] = []
    started = time.perf_counter()
    compared = {0, 1, 2, *range(0, steps, max(steps // 6, 1))}
    threads = torch.get_num_threads()
    if alone.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as many as a worker has
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=rank > 0) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            ids, target = text.at(step)
            begun = time.perf_counter()
            loss = pm.train_step(ids, target=target).item()
            seconds.append(time.perf_counter() - begun)
            beside = ""
            if rank == 0 and step in compared:
                single = alone.train_step(ids, target)
                if step < 3:  # afterwards it has seen fewer steps
                    beside = f", one device {single:.4f}"
            progress.update(task, advance=1, description=f"loss {loss:.3f}")
            if step < 3 or step % 10 == 9:
                progress.console.print(f"step {step + 1:3}: loss {loss:.4f}{beside}, {seconds[-1] * 1e3:.0f} ms")
            if time.perf_counter() - started > limit and step >= 2:
                break
    torch.set_num_threads(threads)
    return seconds[1:] or seconds


if __name__ == "__main__":
    main()
