"""Prices where the optimizer steps on the host, with its state in the host's memory (``offload="optimizer"``).

Gradients go to the host and parameters come back, at half duplex; the step reads and writes what an Adam has, seven
times the parameters' bytes. Both rates are assumed, not measured: 16 lanes of PCIe 4 at 80 % of their 31.5 GB/s, and
a device's share of the host's memory bandwidth (an eighth of twelve channels of DDR5-4800, 460 GB/s).
"""

from __future__ import annotations

from typing import Any

_LINK_BYTES_PER_S = 25e9
_HOST_BYTES_PER_S = 58e9
_PASSES = 7
AWAY = (
    f"The optimizer's state is on the host; its step is priced at {_LINK_BYTES_PER_S / 1e9:.0f} GB/s to the host and"
    f" {_HOST_BYTES_PER_S / 1e9:.0f} GB/s of host memory a device, which is assumed, not measured"
)


class HostOptimizer:
    """Implements `planner.costs.base.Costs`: those of `costs`, the optimizer's step aside."""

    def __init__(self, costs: Any) -> None:
        self._costs = costs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._costs, name)

    def optimizer(self, nbytes: int, device: int) -> float:
        return 2 * nbytes / _LINK_BYTES_PER_S + _PASSES * nbytes / _HOST_BYTES_PER_S
