"""What the emulated links really do: goodput and latency beside what was asked for.

    python -m benchmarks.cluster [--hosts 2]

Emulated links need root (for network namespaces and control groups, nothing else), iproute2 and a C compiler. Where one
of them is missing, this says which, and shows the loopback. Nothing is left behind; what a killed run could not remove
is removed by the next one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from rich.console import Console
from rich.table import Table

from benchmarks.cluster import EmulatedCluster, missing, uniform

ASKED = ((50, 0.0), (200, 0.0), (1000, 0.0), (0, 0.0), (200, 1.0), (1000, 5.0))


def ping(rank: int, nbytes: int, repeats: int) -> float:
    """Median seconds of one way between ranks 0 and 1."""
    import torch
    import torch.distributed as dist

    if rank > 1:
        return 0.0
    here, there = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        receive = dist.irecv(there, 1 - rank)
        if rank == 0:
            dist.send(here, 1)
            receive.wait()
        else:
            receive.wait()
            dist.send(here, 0)
        seconds.append((time.perf_counter() - started) / 2)
    return statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description="Goodput and latency of the emulated links.")
    parser.add_argument("--hosts", type=int, default=2)
    given = parser.parse_args()
    why = missing()
    if why:
        print(f"no emulated links here: {why}; this is the loopback", file=sys.stderr)
    table = Table("asked for", "goodput", "one way of 8 bytes")
    with EmulatedCluster(uniform(given.hosts), loopback=why is not None) as cluster:
        for rate, delay in ASKED if not why else ((0, 0.0),):
            cluster.change(uniform(given.hosts, rate, delay))
            time.sleep(0.1)
            nbytes = int(min(rate or 2000, 2000) * 1e6 / 8 * 0.2)
            large, small = cluster.run(ping, nbytes, 6)[0], cluster.run(ping, 8, 30)[0]
            goodput = nbytes * 8 / max(large - small, 1e-9) / 1e6
            table.add_row(cluster.links.name, f"{goodput:.0f} Mbit/s", f"{small * 1e3:.2f} ms")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
