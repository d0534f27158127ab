"""What `benchmarks.overhead` and `benchmarks.peers` compare with: one small decoder trained in the ways that there are.

Every contestant is a function without arguments that does a whole training step on this rank (gradients, AdamW) and
returns the loss of what it computed. All start from the same weights and see the same global batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    layers: int = 4
    width: int = 256
    heads: int = 4
    vocab: int = 512
    batch: int = 8
    seq: int = 64


class Block(nn.Module):
    """ways: ranks among which heads and hidden units are split; reduced and entered: what the hand-written tensor
    parallel model does to the results and to the inputs of the split products."""

    def __init__(self, size: Size, ways: int = 1) -> None:
        super().__init__()
        width, part = size.width, size.width // ways
        self.head_dim = width // size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, part, bias=False) for _ in range(3))
        self.o = nn.Linear(part, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * part, bias=False), nn.Linear(4 * part, width, bias=False)
        self.entered: Callable[[torch.Tensor], torch.Tensor] = _same
        self.reduced: Callable[[torch.Tensor], torch.Tensor] = _same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.entered(self.norm1(x))
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.reduced(self.o(mixed))
        return x + self.reduced(self.down(F.gelu(self.up(self.entered(self.norm2(x))))))


class Decoder(nn.Module):
    def __init__(self, size: Size, ways: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocab, size.width)
        self.layers = nn.ModuleList(Block(size, ways) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain and distributed tensors in groups of their own: one foreach call takes only one kind."""
    kinds: dict[type, list[Any]] = {}
    for parameter in parameters:
        kinds.setdefault(type(parameter.data), []).append(parameter)
    return torch.optim.AdamW([{"params": held} for held in kinds.values()], lr=1e-4, foreach=True)


def made(size: Size) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    """Model and global batch, the same on every rank."""
    torch.manual_seed(0)
    model = Decoder(size)
    ids = torch.randint(size.vocab, (size.batch, size.seq))
    return model, ids, torch.randint(size.vocab, (size.batch, size.seq))


# -- one device --------------------------------------------------------------------------------------------------------


def eager(size: Size) -> Step:
    model, ids, target = made(size)
    return _plain(model, ids, target)


def device_map(size: Size) -> Step:
    """accelerate's hooks around modules, which compute on one device at a time: here there is one kind of device, so
    that nothing has to be moved."""
    from accelerate import dispatch_model

    model, ids, target = made(size)
    mapped = dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    return _plain(mapped, ids, target)


def compiled(size: Size) -> Step:
    model, ids, target = made(size)
    return _plain(torch.compile(model, fullgraph=True), ids, target)


def _plain(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> Step:
    optimizer = adamw(model.parameters())

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(ids), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# -- data parallel -----------------------------------------------------------------------------------------------------


def ddp(size: Size, rank: int, ways: int) -> Step:
    model, ids, target = made(size)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _plain(wrapped, ids.chunk(ways)[rank], target.chunk(ways)[rank])


def ddp_accumulating(size: Size, rank: int, ways: int, microbatches: int) -> Step:
    """Gradients of all microbatches but the last are accumulated without communication (`no_sync`)."""
    model, ids, target = made(size)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    parts = list(
        zip(ids.chunk(ways)[rank].chunk(microbatches), target.chunk(ways)[rank].chunk(microbatches), strict=True)
    )
    optimizer = adamw(wrapped.parameters())

    def one(ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = loss_of(wrapped(ids), target) / microbatches
        loss.backward()
        return loss.detach()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        with wrapped.no_sync():
            for part in parts[:-1]:
                total = total + one(*part)
        total = total + one(*parts[-1])
        optimizer.step()
        return total

    return step


def fsdp2(size: Size, rank: int, ways: int) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, ids, target = made(size)
    mesh = init_device_mesh("cpu", (ways,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _plain(model, ids.chunk(ways)[rank], target.chunk(ways)[rank])


# -- tensor parallel ---------------------------------------------------------------------------------------------------


def dtensor_tp(size: Size, ways: int) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, ids, target = made(size)
    mesh = init_device_mesh("cpu", (ways,))
    across, along = ColwiseParallel, RowwiseParallel
    for layer in model.layers:
        plan = {"q": across(), "k": across(), "v": across(), "o": along(), "up": across(), "down": along()}
        parallelize_module(layer, mesh, plan)
    return _plain(model, ids, target)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def megatron(size: Size, rank: int, ways: int) -> Step:
    """As Megatron-LM does it: two all-reduces a layer in either direction, in place."""
    whole, ids, target = made(size)
    model = Decoder(size, ways)
    state = whole.state_dict()
    for name in state:
        if name.endswith(("q.weight", "k.weight", "v.weight", "up.weight")):
            state[name] = state[name].chunk(ways, 0)[rank]
        elif name.endswith(("o.weight", "down.weight")):
            state[name] = state[name].chunk(ways, 1)[rank]
    model.load_state_dict(state)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.entered, layer.reduced = _Entered.apply, _Reduced.apply
    return _plain(model, ids, target)


# -- pipeline ----------------------------------------------------------------------------------------------------------


class Half(nn.Module):
    def __init__(self, model: Decoder, rank: int, ways: int) -> None:
        super().__init__()
        share = math.ceil(len(model.layers) / ways)
        self.embed = model.embed if rank == 0 else None
        self.layers = model.layers[rank * share : (rank + 1) * share]
        self.norm, self.head = (model.norm, model.head) if rank == ways - 1 else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)) if self.norm is not None and self.head is not None else x


CHUNKED = {"zbv": "ScheduleZBVZeroBubble", "interleaved": "ScheduleInterleaved1F1B"}


def torch_pipeline(size: Size, rank: int, ways: int, microbatches: int, kind: str = "1f1b") -> Step:
    """kind: "1f1b", or one of `CHUNKED`, which have two stages a rank."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import PipelineStage, schedules

    model, ids, target = made(size)
    chunks = 2 if kind in CHUNKED else 1
    count = chunks * ways
    mine = [s for s in range(count) if (count - 1 - s if kind == "zbv" and s >= ways else s) % ways == rank]
    parts = [Half(copy.deepcopy(model), stage, count) for stage in mine]
    stages = [PipelineStage(part, s, count, torch.device("cpu")) for part, s in zip(parts, mine, strict=True)]
    schedule: Any
    if kind in CHUNKED:
        schedule = getattr(schedules, CHUNKED[kind])(stages, microbatches, loss_fn=loss_of)
    else:
        schedule = pipelining.Schedule1F1B(stages[0], microbatches, loss_fn=loss_of)
    optimizer = adamw(parameter for part in parts for parameter in part.parameters())
    given = (ids,) if 0 in mine else ()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if count - 1 in mine:
            schedule.step(*given, target=target, losses=losses)
        else:
            schedule.step(*given)
        optimizer.step()
        return torch.stack(losses).mean().detach() if losses else torch.zeros(())

    return step


# -- planned -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """Ours as a user runs it."""

    pm: Any
    batch: tuple[torch.Tensor, torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.pm.train_step(self.batch[0], target=self.batch[1])


def planned(size: Size, ways: int) -> Planned:
    """The plan is the planner's."""
    import shardplan as sp

    model, *batch = made(size)
    return Planned(sp.auto_parallel(model, ways, tuple(batch), loss_fn=loss_of, optimizer=adamw), tuple(batch))
