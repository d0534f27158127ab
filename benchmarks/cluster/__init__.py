"""An emulated cluster on one machine: real ranks, real sockets, links with rates and delays per pair of hosts.

    with EmulatedCluster(uniform(2, rate_mbit=1000)) as cluster:
        cluster.run(function, argument)           # function(rank, argument) on every rank
        cluster.change(uniform(2, 200, delay_ms=1))

Needs root for network namespaces, ``iproute2`` and a C compiler; ``EmulatedCluster(links, loopback=True)`` runs
anywhere, without shaping. ``python -m benchmarks.cluster`` measures what the links really do.
"""

from benchmarks.cluster.links import Link, Links, nodes, uniform
from benchmarks.cluster.network import missing
from benchmarks.cluster.ranks import EmulatedCluster, RankFailed

__all__ = ["EmulatedCluster", "Link", "Links", "RankFailed", "missing", "nodes", "uniform"]
