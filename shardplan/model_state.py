"""The state of a running model: its parameters and gradients, whole or in shards, and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardplan.batch import move
from shardplan.checkpoints import Checkpoints, Facts, Saving, encodable
from shardplan.errors import NotSupported, UsageError
from shardplan.planner.plan import Plan
from shardplan.planner.units import parse_nbytes
from shardplan.ranks import InPlace, Ranks
from shardplan.remote_optimizer import RemoteOptimizer
from shardplan.runtime import rank_calls
from shardplan.runtime.supply import Supply
from shardplan.runtime.worker import Session
from shardplan.sampling import Sampler, State
from shardplan.values import config_files, first_names, state_dict_problems, tensors_of, to_write


class ModelState:
    """The part of `ParallelModel` that reads, writes and replaces state. rest: values of what no rank holds."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._supply = Supply()
        self._rest = Supply()
        self._checkpoints = Checkpoints(self._ranks)
        self._samplers: list[Sampler] = []
        self._places: list[State] = []  # of samplers, in the checkpoint that was loaded
        self._steps = 0
        self._optimizer: RemoteOptimizer | None = None

    @property
    def plan(self) -> Plan:
        raise NotImplementedError

    def _ranks(self) -> Ranks:
        raise NotImplementedError

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, None without one: under torchrun this rank's own; in a driver a `RemoteOptimizer`, whose
        options (a learning rate that is set, or moved by a scheduler made of it) hold from the next step on."""
        ranks = self._ranks()
        if isinstance(ranks, InPlace):
            return rank_calls.engine_of(ranks.session).optimizer
        self._send_options()
        groups = ranks.call(rank_calls.optimizer_groups)
        if groups is None:
            return None
        if self._optimizer is None:
            self._optimizer = RemoteOptimizer(groups, self.optimizer_step, self.zero_grad)
        self._optimizer.take(groups)
        return self._optimizer

    def optimizer_step(self) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        raise NotImplementedError

    def _send_options(self) -> None:
        """Before the ranks' optimizers step."""
        changes = self._optimizer.changes() if self._optimizer is not None else []
        if changes:
            self._ranks().call(rank_calls.set_options, changes)

    def average_replicas(self) -> None:
        """Where replicas step by themselves (``average_every=``): have them take the mean of their parameters now."""
        self._ranks().call(rank_calls.average_replicas)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's local parameters by original name (under torchrun)."""
        return rank_calls.engine_of(self._session("parameters")).named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's local parameters (under torchrun)."""
        return (parameter for _, parameter in self.named_parameters())

    def _session(self, what: str) -> Session:
        ranks = self._ranks()
        if not isinstance(ranks, InPlace):
            raise NotSupported(
                f"{what} of this model are held by its workers, not by this process",
                hints=["full_state_dict() and full_gradients() bring whole tensors here"],
            )
        return ranks.session

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """What ``state_dict()`` of the unsplit model would hold now, on the CPU (rank 0 under torchrun, {} on the
        others). Parameters that the loss does not use have the values they came with."""
        found = self._ranks().call(rank_calls.full_state_dict)
        if not found:
            return {}
        own = {name: v for name, v in self._model.state_dict().items() if isinstance(v, torch.Tensor)}
        first = first_names(self._model)
        with self._rest.open(torch.device("cpu")) as values:
            for name, value in own.items():
                if name not in found:
                    found[name] = values.whole(first[name], tuple(value.shape), value.dtype)
        return {name: found[name].detach().cpu() for name in own}

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter name, on the CPU (rank 0 under torchrun, {} on the others)."""
        return move(self._ranks().call(rank_calls.full_gradients), lambda t: t.detach().cpu())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's parameters and buffers by original name, as distributed tensors, under torchrun
        (torch.distributed.checkpoint reshards them); whole tensors in a process that drives workers."""
        ranks = self._ranks()
        if isinstance(ranks, InPlace):
            return rank_calls.engine_of(ranks.session).state_dict()
        return self.full_state_dict()

    def load_state_dict(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Replace parameters and buffers by those of a state dict of the unsplit model, or (under torchrun) by those
        that `state_dict` gave. Raises UsageError naming missing and unexpected entries and wrong shapes."""
        ranks = self._ranks()
        if isinstance(ranks, InPlace) and any(hasattr(value, "device_mesh") for value in whole.values()):
            rank_calls.engine_of(ranks.session).load_state_dict(whole)
            return
        wrong = state_dict_problems(self._model, whole)
        if wrong:
            raise UsageError("this state dict is not of this model", wrong)
        own = tensors_of(self._model)
        given = {name: whole[name] for name in own if name in whole}
        ranks.call(rank_calls.load_weights, replace(self._supply, whole={**self._supply.whole, **given}))
        rest = {name: given[name] for name in self._rest.names() if name in given}
        self._rest = replace(self._rest, whole={**self._rest.whole, **rest})

    def save(self, path: str | os.PathLike[str], *, wait: bool = True, keep: int = 0, extra: Any = None) -> Saving:
        """Write the whole training state into a directory; it loads under any plan.

        It has its name once it is whole; an older one is replaced. wait: False returns as soon as the state is copied
        and writes it while training goes on; what went wrong is raised by ``.wait()`` of the result, or by the next
        `save`, `load` or `close`. keep: `path` is a directory of checkpoints by step, and the last `keep` of them stay.
        extra: JSON values of yours, given back by `load`. Raises CheckpointError on every rank.
        """
        places = [sampler.state() for sampler in self._samplers]
        facts = {"model": self.plan.model, "extra": encodable(extra), "samplers": places}
        return self._checkpoints.save(path, facts, wait, keep)

    def save_weights(self, path: str | os.PathLike[str], max_shard: int | str = "5 GB") -> None:
        """Write the weights of the unsplit model into a directory of safetensors files, with its configuration if it
        has one: what ``weights=`` and Hugging Face's ``from_pretrained`` read. Tied tensors are written once.

        Tensors are gathered one at a time; no process holds the model. max_shard: bytes of a file. Raises
        CheckpointError; a directory under that name is whole, and one that holds other files is left as it is.
        """
        try:
            max_nbytes = parse_nbytes(max_shard)
        except ValueError as error:
            raise UsageError(f"max_shard: {error}") from None
        others = config_files(self._model)
        announced = to_write(self._model)
        self._ranks().call(rank_calls.save_weights, os.path.abspath(path), announced, self._rest, max_nbytes, others)

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Read what `save` wrote, under this or any other plan; of a directory of checkpoints the last whole one.

        -> what was given as ``extra=``. Every byte is compared with its checksum. Raises CheckpointError.
        """
        return self._take(*self._checkpoints.load(path))[1]

    def resume(self, path: str | os.PathLike[str]) -> int:
        """As `load`, if there is a checkpoint. -> steps that are done: 0 at the first start.

        With it a script that is started again goes on where its last checkpoint was::

            for step in range(pm.resume("runs/a"), steps):
                pm.train_step(...)
                if step % 100 == 99:
                    pm.save("runs/a", keep=3, wait=False)
        """
        return self._take(*self._checkpoints.load_if_any(path))[0]

    def _take(self, steps: int, facts: Facts) -> tuple[int, Any]:
        self._steps = steps
        self._places = facts.get("samplers", [])
        for sampler, place in zip(self._samplers, self._places, strict=False):
            sampler.restore(place)
        return steps, facts.get("extra")
