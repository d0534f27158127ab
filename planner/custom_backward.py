"""Whether the backward that a custom autograd.Function defines is what autograd derives from its forward.

A graph of forward ops cannot hold any other backward. Many such functions are only faster or leaner versions of what
autograd would do (a fused gelu); these may be traced as their forward. The check runs both on small random tensors in
float64, in a thread of its own because the tracer's modes are per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

SMALL = (7, 5, 6, 4, 3)
TRIALS = 2


class _Context:
    """Stands for the ctx of a Function's forward: keeps what is assigned, ignores what is called."""

    needs_input_grad: tuple[bool, ...] = ()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def is_plain(function: type[torch.autograd.Function], apply: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether ``apply(*args)`` (the function's own, unpatched) has the gradients of its forward's ops.

    args: as the model gave them; only shapes and plain values are used. Anything that cannot be checked is not plain.
    """
    agreed: list[bool] = []

    def check() -> None:
        try:
            agreed.extend(_agrees(function, apply, args, seed) for seed in range(TRIALS))
        except Exception:
            agreed.append(False)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    return bool(agreed) and all(agreed)


def _agrees(function: Any, apply: Callable[..., Any], args: tuple[Any, ...], seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[int, int] = {}
    for arg in args:
        if isinstance(arg, torch.Tensor):
            for extent in arg.shape:
                if extent > max(SMALL) and extent not in sizes:
                    sizes[extent] = SMALL[len(sizes)]

    def small(arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        if not arg.dtype.is_floating_point:
            raise TypeError("only floating tensors can be made up")
        shape = [sizes.get(extent, extent) for extent in arg.shape]
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    given = [small(arg) for arg in args]
    inputs = [arg for arg in given if isinstance(arg, torch.Tensor)]
    own = apply(*given)
    if function.setup_context is torch.autograd.Function.setup_context:
        derived = function.forward(_Context(), *given)
    else:
        derived = function.forward(*given)
    if not isinstance(own, torch.Tensor) or not torch.allclose(own, derived):
        return False
    weights = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(own, inputs, weights, allow_unused=True)
    found = torch.autograd.grad(derived, inputs, weights, allow_unused=True)
    return all(
        a is b if a is None or b is None else torch.allclose(a, b, rtol=1e-6, atol=1e-9)
        for a, b in zip(wanted, found, strict=True)
    )
