"""Steps on one device: predicted and measured, and the rewritten graph beside the eager module and `torch.compile`."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu.alone import Alone
from benchmarks.gpu.jobs import SINGLE, Job, adamw, planned, target_of
from benchmarks.protocol import interleaved

Step = Callable[[], torch.Tensor]


def rows(device: torch.device, small: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """A row a job, as it is done; where one cannot run, its error."""
    for job in SINGLE:
        try:
            yield _row(job, device, small, repeats)
        except Exception as error:  # one model that does not fit must not take the others with it
            yield {"name": job.name, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _row(job: Job, device: torch.device, small: bool, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    target = target_of(job, small, on_meta=False)
    found = planned(target, [str(device)])
    weights = {**dict(target.model.named_parameters()), **dict(target.model.named_buffers())}
    ours = Alone(found.program, 0, device, adamw, found.batch, weights)
    measured = ours.measured(max(repeats // 2, 3))
    ours.engine.load_full(weights)
    contestants: dict[str, Step] = {"ours": ours.step}
    if job.compiled:
        contestants["ours compiled"] = Alone(
            found.program, 0, device, adamw, found.batch, weights, backend="inductor"
        ).step
    model = target.model.to(device)
    batch = {name: value.to(device) for name, value in target.random_batch(0).items()}
    contestants["eager"] = _plain(model, model.parameters(), target.loss_fn, batch, device)
    if job.compiled:
        contestants["torch.compile"] = _plain(torch.compile(model), model.parameters(), target.loss_fn, batch, device)
    first = {name: float(step()) for name, step in list(contestants.items()) if "compile" not in name}
    samples = interleaved(contestants, repeats)
    stage = found.plan.stages[0]
    return {
        "name": job.name,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "predicted_seconds": found.plan.step_seconds,
        "predicted_nbytes": stage.memory.peak_nbytes - stage.memory.reserve,
        "nbytes": measured.peak_nbytes,
        "losses": first,
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "samples": samples,
    }


def _plain(
    model: Callable[..., Any],
    parameters: Iterable[nn.Parameter],
    loss_fn: Any,
    batch: dict[str, torch.Tensor],
    device: torch.device,
) -> Step:
    optimizer = adamw(parameters)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        if loss_fn is None:
            loss = model(**batch).loss
        else:
            inputs = {name: value for name, value in batch.items() if name != "target"}
            loss = loss_fn(model(**inputs), batch["target"])
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return loss.detach()

    return step
