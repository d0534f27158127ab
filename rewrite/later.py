"""Backward in two parts: what stage code calls under a schedule that puts off the gradients of weights.

``BACKWARD_INPUT`` runs backward through everything that depends on what the stage received; ``BACKWARD_WEIGHT`` does
the rest. Values are of three kinds, which `rewrite.split_backward` tells apart: those that depend on received ones
(the chain), those that depend on parameters only, and those without a gradient.

* A product of a chain value and weights is asked by backward of the chain for the gradient of the chain value only; the
  weights' wait. Nothing is computed twice, and all that is kept is what the product itself keeps. A linear map has its
  two gradients written out (`linear`), any other product is a small graph of its own (`split`).
* A value of parameters only enters the chain through `hold`: the chain ends there, and its gradient waits.
* Other ops that mix both (a bias that is added, the scale of a norm) are left alone: their small gradients come along.
* A segment that is recomputed (`recomputed`) is run again by the chain's backward, once; its products then wait. Linear
  maps whose values nothing in the segment keeps are left out of the second run, and the sums over ranks behind them.

What waits is on the `Later` of the microbatch, which whoever runs the code puts on the communicator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from shardplan.rewrite.comm import Comm

aten = torch.ops.aten

_LOT_NBYTES = 16 << 20
_Map = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool]


class Later:
    """The gradients of one microbatch that wait. again: a segment is being run for the second time."""

    def __init__(self) -> None:
        self._edges: list[GradientEdge] = []
        self._gradients: list[torch.Tensor] = []
        self._weights: dict[int, torch.Tensor] = {}
        self._held: list[tuple[GradientEdge, torch.Tensor]] = []
        self._maps: list[_Map] = []
        self.again = False

    def map(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
    ) -> None:
        """Leave the gradients of a linear map's weight and bias. x: its input; gradient: of its result."""
        self._maps.append((x, gradient, weight, bias, transposed))

    def product(self, edge: GradientEdge, gradient: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        """Leave the gradients of a product's weights."""
        self._edges.append(edge)
        self._gradients.append(gradient)
        for weight in weights:
            self._weights[id(weight)] = weight

    def hold(self, value: torch.Tensor) -> torch.Tensor:
        """-> the value as a leaf, whose gradient is handed on later."""
        leaf = value.detach().requires_grad_()
        self._held.append((get_gradient_edge(value), leaf))
        return leaf

    def run(self, edges: Sequence[GradientEdge] = (), gradients: Sequence[torch.Tensor] = ()) -> None:
        """All that waits; then backward from `edges` too, results that depend on parameters only."""
        products, arrived = self._edges, self._gradients
        weights = list(self._weights.values())
        self._edges, self._gradients, self._weights = [], [], {}
        if products:
            torch.autograd.backward(products, arrived, inputs=weights)
        products.clear()
        arrived.clear()
        self._run_maps()
        held = [(edge, leaf.grad) for edge, leaf in self._held if leaf.grad is not None]
        self._held = []
        starts = [*(edge for edge, _ in held), *edges]
        if starts:
            torch.autograd.backward(starts, [*(gradient for _, gradient in held), *gradients])

    def _run_maps(self) -> None:
        """Gradients are handed to the weights in lots, so that few of them are there at once."""
        maps, self._maps = self._maps, []
        maps.reverse()
        leaves: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        nbytes = 0
        while maps:
            x, gradient, weight, bias, transposed = maps.pop()
            rows, taken = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1]).conj()
            if weight.requires_grad:
                leaves.append(weight)
                gradients.append(taken.t() @ rows if transposed else rows.t() @ taken)
                nbytes += gradients[-1].nbytes
            if bias is not None and bias.requires_grad:
                leaves.append(bias)
                gradients.append(rows.sum(0))
            del x, gradient, rows, taken
            if leaves and (nbytes > _LOT_NBYTES or not maps):
                torch.autograd.backward(leaves, gradients)
                leaves, gradients, nbytes = [], [], 0


def linear(
    comm: Comm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
    kept: bool = True,
) -> torch.Tensor:
    """x: [..., in] of the chain; weight: [out, in] ([in, out] if transposed), bias: [out], leaves. -> [..., out].

    kept: whether the value matters when the segment is run again.
    """
    if not torch.is_grad_enabled() or not x.requires_grad:
        return aten.linear.default(x, weight.t() if transposed else weight, bias)
    return _Linear.apply(comm.later, (weight, bias), transposed, kept, x)  # type: ignore[return-value]


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        later: Later,
        weights: tuple[torch.Tensor, torch.Tensor | None],
        transposed: bool,
        kept: bool,
        x: torch.Tensor,
    ) -> torch.Tensor:
        ctx.later, ctx.weights, ctx.transposed = later, weights, transposed
        ctx.save_for_backward(x)
        weight = weights[0].t() if transposed else weights[0]
        if later.again and not kept:
            return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])
        return aten.linear.default(x, weight, weights[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weights
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            ctx.later.map(x, gradient, weight, bias, ctx.transposed)
        ctx.later = ctx.weights = None
        return None, None, None, None, gradient @ (weight.t() if ctx.transposed else weight).conj()


def summed(function: Callable[..., torch.Tensor], comm: Comm, x: torch.Tensor, axis: str) -> torch.Tensor:
    """A sum over ranks whose gradient is left as it is, behind a linear map whose value is not kept."""
    return x if comm.later.again and torch.is_grad_enabled() else function(comm, x, axis)


def split(
    comm: Comm,
    function: Callable[..., torch.Tensor],
    chain: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """``function(*chain, *weights)``, a product. weights: leaves."""
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in chain):
        return function(*chain, *weights)
    trained = [weight for weight in weights if weight.requires_grad]
    return _Split.apply(comm.later, function, weights, trained, *chain)  # type: ignore[return-value]


class _Split(Function):
    @staticmethod
    def forward(
        ctx: Any,
        later: Later,
        function: Callable[..., torch.Tensor],
        weights: tuple[torch.Tensor, ...],
        trained: list[torch.Tensor],
        *chain: torch.Tensor,
    ) -> torch.Tensor:
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_(value.requires_grad) for value in chain]
            result = function(*leaves, *weights)
        ctx.later, ctx.trained = later, trained
        ctx.leaves = leaves
        ctx.edge = get_gradient_edge(result)
        return result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        leaves, edge = ctx.leaves, ctx.edge
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad([edge], wanted, [gradient], retain_graph=bool(ctx.trained)))
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        if ctx.trained:
            ctx.later.product(edge, gradient, ctx.trained)
        ctx.leaves = ctx.edge = ctx.trained = ctx.later = None
        return None, None, None, None, *gradients


def hold(comm: Comm, value: torch.Tensor) -> torch.Tensor:
    """A value of parameters only, where the chain reads it."""
    if not torch.is_grad_enabled() or not value.requires_grad:
        return value
    return comm.later.hold(value)


def recomputed(
    comm: Comm,
    function: Callable[..., Any],
    chain: tuple[torch.Tensor, ...],
    others: tuple[Any, ...],
    differentiable: tuple[int, ...],
) -> Any:
    """``function(*chain, *others)``, run again in backward. differentiable: positions of results of the chain."""
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in chain):
        return function(*chain, *others)
    found = _Recomputed.apply(comm.later, function, others, differentiable, *chain)
    return found[0] if len(found) == 1 else found  # type: ignore[index, arg-type]


class _Recomputed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        later: Later,
        function: Callable[..., Any],
        others: tuple[Any, ...],
        differentiable: tuple[int, ...],
        *chain: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        results = _tuple(function(*chain, *others))
        ctx.later, ctx.function, ctx.others = later, function, others
        ctx.save_for_backward(*chain)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(r for i, r in enumerate(results) if i not in differentiable or not r.is_floating_point())
        )
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        chain = ctx.saved_tensors
        later = ctx.later
        later.again = True
        try:
            with torch.enable_grad():
                leaves = [value.detach().requires_grad_(value.requires_grad) for value in chain]
                results = _tuple(ctx.function(*leaves, *ctx.others))
        finally:
            later.again = False
        pairs = [
            (get_gradient_edge(result), gradient)
            for result, gradient in zip(results, gradients, strict=True)
            if gradient is not None and result.requires_grad
        ]
        del results
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [gradient for _, gradient in pairs])
        ctx.later = ctx.function = ctx.others = None
        return None, None, None, None, *(leaf.grad for leaf in leaves)


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
