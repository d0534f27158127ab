"""What the NVIDIA driver says about the links of a GPU, through its management library (NVML) where there is one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_SUCCESS = 0
_MOST_NVLINKS = 18
_GIGATRANSFERS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
"""Per second and lane, by generation of PCI Express."""


@dataclass(frozen=True, slots=True)
class GpuLinks:
    """nvlinks: that are up. pcie_generation, pcie_lanes: the most that the GPU and its slot can do, 0 where unknown."""

    nvlinks: int
    pcie_generation: int
    pcie_lanes: int

    @property
    def pcie_bytes_per_s(self) -> float:
        """In one direction, a bit per transfer and lane as the presets count; 0 where unknown."""
        return _GIGATRANSFERS.get(self.pcie_generation, 0.0) * 1e9 * self.pcie_lanes / 8


def gpu_links(uuid: str, library: Any = None) -> GpuLinks | None:
    """Links of the GPU of that UUID ("GPU-..." or the bare number). None where the library is missing or refuses.

    library: NVML, for tests; default: the driver's.
    """
    if library is None:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
    if library.nvmlInit_v2() != _SUCCESS:
        return None
    try:
        handle = ctypes.c_void_p()
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) != _SUCCESS:
            return None
        up = sum(_number(library.nvmlDeviceGetNvLinkState, handle, ctypes.c_uint(n)) == 1 for n in range(_MOST_NVLINKS))
        generation = _number(library.nvmlDeviceGetMaxPcieLinkGeneration, handle)
        return GpuLinks(up, generation, _number(library.nvmlDeviceGetMaxPcieLinkWidth, handle))
    finally:
        library.nvmlShutdown()


def _number(call: Any, *arguments: Any) -> int:
    """What a call writes to its last argument; 0 where it fails (a GPU without NVLink)."""
    value = ctypes.c_uint()
    return value.value if call(*arguments, ctypes.byref(value)) == _SUCCESS else 0


__all__ = ["GpuLinks", "gpu_links"]
