"""The calls of a model that a job can run: the planned one, and others as they come.

Another batch size (a last, smaller batch), another length, an input more, other constants, evaluation mode: each is
traced once, gets the plan carried over (`planner.adapt`) and a program of its own on the ranks. At most `HELD` of them
are kept, the least recently used one goes first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardplan.batch import Batch, Inputs, signature
from shardplan.planner.adapt import adapt
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile as compile_program
from shardplan.rewrite.program import Program

HELD = 8

log = logging.getLogger("shardplan")


@dataclass(frozen=True, slots=True)
class Call:
    """key: of its program on the ranks. inputs: checks and takes apart batches of this call."""

    key: str
    trace: Trace
    plan: Plan
    inputs: Inputs


class Calls:
    """model: in the caller's hands; its modules' modes count. plan, trace, inputs: of the planned call."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        plan: Plan,
        trace: Trace,
        inputs: Inputs,
        quiet: bool,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.planned = Call("train" if trace.training else "forward", trace, plan, inputs)
        self.quiet = quiet
        self._modes = self._mode()
        self._signature = inputs.signature
        self._held: OrderedDict[tuple[Any, ...], Call] = OrderedDict()
        self._made = 0

    def _mode(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.model.modules())

    def find(self, batch: Batch, training: bool) -> tuple[Call, Program | None, str | None]:
        """The call that a batch is -> (call, its program if the ranks do not have it yet, key of one to be dropped).

        Raises InputMismatch for a batch that the planned inputs rule out, NotTraceable.
        """
        self.planned.inputs.check(batch, training)
        mode = self._mode()
        planned = mode == self._modes and training == self.planned.trace.training
        if planned and signature(batch) == self._signature:
            return self.planned, None, None
        name = (training, mode, signature(batch))
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name], None, None
        call, program = self._make(batch, training, mode)
        self._held[name] = call
        dropped = self._held.popitem(last=False)[1].key if len(self._held) > HELD else None
        return call, program, dropped

    def _make(self, batch: Batch, training: bool, mode: tuple[bool, ...]) -> tuple[Call, Program]:
        self._made += 1
        kind = "train" if training else "forward"
        known = self.planned.inputs.part_of(batch)
        if not training and self.planned.trace.training and mode == self._modes and known is not None:
            # The planned graph computes the outputs as well; those that need what is not given are left out.
            inputs, trace, plan, seconds = self.planned.inputs, self.planned.trace, self.planned.plan, 0.0
        else:
            known = None
            trace = trace_model(
                self.model,
                batch.args,
                batch.kwargs,
                loss_fn=self.loss_fn if training else None,
                target=batch.target if training else None,
                training=training,
                evaluate=False,
                leaves=self.planned.trace.leaves(),
                precision=self.planned.trace.precision,
            )
            plan, inputs = adapt(self.planned.plan, trace), Inputs(trace, batch.on_meta(), batch.target)
            seconds = trace.seconds
        program = compile_program(trace, plan, kind, known)
        if seconds and not self.quiet:
            self._tell(batch, plan, training, seconds)
        return Call(f"{kind} {self._made}", trace, plan, inputs), program

    def _tell(self, batch: Batch, plan: Plan, training: bool, seconds: float) -> None:
        told = "a step" if training else "a forward call"
        shapes = ", ".join(f"{name} {text}" for name, text in plan.inputs.items())
        dp = plan.stages[0].mesh.size("dp")
        whole = f"; {plan.batch_size} does not divide by dp={dp}: every replica computes all of it" if dp > 1 else ""
        # The planned batch in another mode is what everybody does; other sizes may be news.
        level = logging.INFO if plan.inputs.items() <= self.planned.plan.inputs.items() else logging.WARNING
        log.log(
            level,
            "%s with %s is not the planned call: traced in %.1f s (%d of %d such calls are kept)%s",
            told,
            shapes,
            seconds,
            len(self._held) + 1,
            HELD,
            whole if plan.batch_size % dp else "",
        )
