"""The optimizer's state in the memory of the host (``offload="optimizer"``; ZeRO-Offload, Ren et al. 2021).

The optimizer has a copy of every parameter on the host and steps there: gradients are copied to the host before a step,
parameters back after it. What is on the host anyway is not copied: there the optimizer has the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_HOST = torch.device("cpu")


class Offloaded:
    """stepped: what the optimizer has, by name. always: copy what is on the host as well."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], always: bool = False) -> None:
        self.stepped: dict[str, nn.Parameter] = {}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, parameter in parameters.items():
            if not parameter.requires_grad or (parameter.device.type == _HOST.type and not always):
                self.stepped[name] = parameter
                continue
            copied = torch.empty_like(parameter.data, device=_HOST, pin_memory=parameter.is_cuda)
            self.stepped[name] = nn.Parameter(copied)
            self._pairs.append((parameter, self.stepped[name]))
        self.take()

    def take(self) -> None:
        """Parameters have changed: bring the host's up to date."""
        with torch.no_grad():
            for parameter, copied in self._pairs:
                copied.copy_(parameter)

    def collect(self) -> None:
        """Before a step: gradients come to the host."""
        for parameter, copied in self._pairs:
            if parameter.grad is None:
                copied.grad = None
                continue
            if copied.grad is None:
                copied.grad = torch.empty_like(copied.data, pin_memory=parameter.is_cuda)
            copied.grad.copy_(parameter.grad, non_blocking=True)
        self._settle()

    def give(self) -> None:
        """After a step: parameters go back."""
        with torch.no_grad():
            for parameter, copied in self._pairs:
                parameter.copy_(copied, non_blocking=True)
        self._settle()

    def _settle(self) -> None:
        if self._pairs and self._pairs[0][0].is_cuda:
            torch.cuda.current_stream(self._pairs[0][0].device).synchronize()
