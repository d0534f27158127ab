"""How well the link model predicts published collective timings, and the fit of its constants to them.

    python benchmarks/fit_links.py collectives.jsonl           # errors of the shipped constants, by system
    python benchmarks/fit_links.py collectives.jsonl --fit     # fit constants and latencies anew, print them
    python benchmarks/fit_links.py collectives.jsonl --hold-out  # fit without each system in turn, test on it

The file has one JSON object a line: "table", "n_gpus", "nodes", "collective", "size_bytes", "time_us" and/or
"busbw_GBps" (nccl-tests' definition; used where there is no time).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from shardplan.planner.cluster import Cluster, Wiring
from shardplan.planner.costs.links import FABRICS, Fabric, LinkModel


@dataclass(frozen=True)
class Row:
    """One published time. system: what the model is told about the machine."""

    system: str
    preset: str
    nodes: int
    size: int
    kind: str
    nbytes: int
    seconds: float


# Published table -> (name in the report, node preset). Left out: tables without sizes; a cluster that its own log calls
# badly configured; runs with in-switch reduction turned off.
_SYSTEMS: dict[str, tuple[str, str]] = {
    "h100_1node_nvidia_llmb": ("H100 8", "dgx-h100"),
    "h100_2nodes_issue309": ("H100 multi-node", "dgx-h100"),
    "h100_4nodes_issue309": ("H100 multi-node", "dgx-h100"),
    "h100_8nodes_issue309": ("H100 multi-node", "dgx-h100"),
    "h100_2of8nodes_issue309": ("H100 multi-node", "dgx-h100"),
    "h100_2nodes_oracle": ("H100 multi-node", "dgx-h100"),
    "h100_2nodes_aws": ("H100 EFA", "p5"),
    "h200_1node_mle": ("H200 8", "hgx-h200"),
    "h200_collectives": ("H200 8", "hgx-h200"),
    "nvls_ramp": ("H200/B200 4-8", ""),
    "b200_mle": ("B200 8-32 EFA", "p6-b200"),
    "a100_1node_mle": ("A100 2-8", "dgx-a100"),
    "vtrain_a100": ("A100 2-8", "dgx-a100"),
    "mist_a100_40gb": ("A100-40G 2-8", "p4d"),
    "mist_a100_40gb_p2p": ("A100-40G p2p", "p4d"),
    "vtrain_v100": ("V100 vtrain", "dgx-1"),
    "aceso_v100": ("V100 2-8", "dgx-1"),
    "aceso_v100_p2p": ("V100 p2p", "dgx-1"),
    "mist_l4": ("L4 2-8", "g2-standard-96"),
    "mist_l4_p2p": ("L4 p2p", "g2-standard-96"),
    "mist_a10g": ("A10G 2-8", "g5-48xlarge"),
    "mist_a10g_p2p": ("A10G p2p", "g5-48xlarge"),
}


_LISTS = "lists"
"""Suffix of systems whose all_gather and reduce_scatter were timed with lists of tensors, copies included. They are
reported and not fitted to: this project's collectives write into one tensor, as nccl-tests' do."""


def bus_factor(kind: str, size: int) -> float:
    """nccl-tests: bus bandwidth = bytes / seconds x this."""
    if kind == "p2p":
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (size - 1) / size


def read(path: str) -> list[Row]:
    rows = []
    with open(path) as file:
        for line in file:
            data = json.loads(line)
            if data["table"] not in _SYSTEMS or not data.get("size_bytes"):
                continue
            if data["collective"] == "all_reduce" and (
                "NVLS_ENABLE=0" in data["mode"] or (data["table"] == "h200_collectives" and data.get("algo") == "Ring")
            ):
                continue
            seconds = (data.get("time_us") or 0) * 1e-6
            if not seconds:
                if not data.get("busbw_GBps"):
                    continue
                seconds = data["size_bytes"] * bus_factor(data["collective"], data["n_gpus"])
                seconds /= data["busbw_GBps"] * 1e9
            system, preset = _SYSTEMS[data["table"]]
            if data["mode"].startswith("Aceso") and data["collective"] in ("all_gather", "reduce_scatter"):
                system = f"{system.split()[0]} {_LISTS}"
            preset = preset or ("p6-b200" if data["gpu"].startswith("B200") else "hgx-h200")
            rows.append(
                Row(system, preset, data["nodes"], data["n_gpus"], data["collective"], data["size_bytes"], seconds)
            )
    return rows


Links = dict[tuple[str, str], tuple[float, float]]
"""(node preset, "link" | "uplink") -> factors on the preset's bandwidth and latency."""


class Predictor:
    """Predicted seconds of rows under some constants and corrections of the presets' links."""

    def __init__(self, constants: dict[str, Fabric], links: Links) -> None:
        self.constants, self.links = constants, links
        self.models: dict[tuple[str, int], LinkModel] = {}

    def __call__(self, row: Row) -> float:
        key = row.preset, row.nodes
        if key not in self.models:
            cluster = Cluster.preset(row.preset, row.nodes)
            wires = cluster.wiring[0]
            link, uplink = (
                replace(one, bytes_per_s=one.bytes_per_s * faster, latency_seconds=one.latency_seconds * longer)
                for one, (faster, longer) in (
                    (wires.link, self.links.get((row.preset, "link"), (1.0, 1.0))),
                    (wires.uplink, self.links.get((row.preset, "uplink"), (1.0, 1.0))),
                )
            )
            cluster = replace(cluster, wiring=(Wiring(link, uplink),) * row.nodes)
            self.models[key] = LinkModel(cluster, constants=self.constants)
        model = self.models[key]
        each = row.size // row.nodes
        ranks = tuple(node[index] for node in model.cluster.nodes for index in range(each))
        if row.kind == "p2p":
            return model.p2p(row.nbytes, ranks[0], ranks[-1])
        return model.collective(row.kind, row.nbytes, ranks)


def report(rows: list[Row], predict: Callable[[Row], float], title: str) -> None:
    """Median and 90th percentile of |predicted / published - 1| by system, all sizes and from 1 MiB."""
    print(f"{title}\n  {'system':18} {'rows':>5} {'median':>8} {'p90':>7}   {'>= 1 MiB':>8} {'median':>8} {'p90':>7}")
    for system in [*dict.fromkeys(row.system for row in rows), "all"]:
        mine = [row for row in rows if system in (row.system, "all")]
        texts = []
        for chosen in (mine, [row for row in mine if row.nbytes >= 1 << 20]):
            errors = sorted(abs(predict(row) / row.seconds - 1) for row in chosen)
            if errors:
                worst = errors[math.ceil(0.9 * len(errors)) - 1]
                texts.append(f"{len(errors):5} {statistics.median(errors):8.1%} {worst:7.1%}")
        print(f"  {system:18} {'      '.join(texts)}")


def loss(rows: list[Row], predict: Callable[[Row], float]) -> float:
    """Mean |log(predicted / published)|, every (system, kind) counting the same, sizes below 64 KiB half."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        weight = 1.0 if row.nbytes >= 1 << 16 else 0.5
        error = abs(math.log(predict(row) / row.seconds))
        groups.setdefault((row.system, row.kind), []).append((weight, weight * error))
    return statistics.fmean(sum(e for _, e in pairs) / sum(w for w, _ in pairs) for pairs in groups.values())


def fit(rows: list[Row]) -> tuple[dict[str, Fabric], Links]:
    """Coordinate descent on what the rows can tell, with steps from 30 % down to 1 %.

    Fitted are all constants of the fabrics; latencies inside nodes, and between nodes where there are messages below
    256 KiB; the bandwidth of PCI Express presets without peer access, which no data sheet gives. One pair of GPUs
    alone between nodes is left out: contention cannot be seen in it.
    """
    rows = [row for row in thin(rows) if (row.kind != "p2p" or row.nodes == 1) and not row.system.endswith(_LISTS)]
    constants = dict(FABRICS)
    links: Links = {}
    presets = {row.preset: Cluster.preset(row.preset).wiring[0] for row in rows}
    small = {(row.preset, row.nodes > 1) for row in rows if row.nbytes < 1 << 18}
    best = loss(rows, Predictor(constants, links))

    def attempt(changed: dict[str, Fabric], moved: Links) -> bool:
        nonlocal constants, links, best
        found = loss(rows, Predictor(changed, moved))
        if found < best - 1e-6:
            constants, links, best = changed, moved, found
            return True
        return False

    step = 1.3
    while step > 1.01:
        better = False
        for factor in (step, 1 / step):
            for name in sorted({wires.link.fabric for wires in presets.values()} | {"rdma"}):
                seen = {row.kind for row in rows if presets[row.preset].link.fabric == name}
                for kind in seen if name != "rdma" else {"all_reduce"}:
                    old = constants[name]
                    value = min(old.efficiency[kind] * factor, 1.0)
                    changed = replace(old, efficiency={**old.efficiency, kind: value})
                    better |= attempt({**constants, name: changed}, links)
                for field, most in (("step", 1.0), ("overlap", 2.0), ("reduces", 1.0)):
                    value = getattr(constants[name], field)
                    if value is not None:
                        changed = replace(constants[name], **{field: min(value * factor, most)})
                        better |= attempt({**constants, name: changed}, links)
            for preset, wires in presets.items():
                for end, between in (("link", False), ("uplink", True)):
                    faster, longer = links.get((preset, end), (1.0, 1.0))
                    if not between or (preset, between) in small:
                        better |= attempt(constants, {**links, (preset, end): (faster, longer * factor)})
                    if wires.link.fabric == "pcie" and not between and preset != "g2-standard-96":
                        better |= attempt(constants, {**links, (preset, end): (faster * factor, longer)})
        if not better:
            step = math.sqrt(step)
    return constants, links


def thin(rows: list[Row]) -> list[Row]:
    """One row per system, group and size: enough for a fit."""
    return list({(r.preset, r.system, r.nodes, r.size, r.kind, r.nbytes): r for r in rows}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--hold-out", action="store_true")
    arguments = parser.parse_args()
    rows = read(arguments.path)
    report(rows, Predictor(dict(FABRICS), {}), "shipped constants")
    if arguments.fit:
        constants, links = fit(rows)
        report(rows, Predictor(constants, links), "fitted now")
        for name, fabric in constants.items():
            if fabric != FABRICS[name]:
                print(f"  {name}: {fabric}")
        for (preset, end), (faster, longer) in links.items():
            wires = Cluster.preset(preset).wiring[0]
            link = wires.link if end == "link" else wires.uplink
            rate, latency = link.bytes_per_s * faster, link.latency_seconds * longer
            print(f"  {preset} {end}: {rate / 1e9:.3g} GB/s, {latency * 1e6:.3g} us")
    if arguments.hold_out:
        for system in dict.fromkeys(row.system for row in rows):
            constants, links = fit([row for row in rows if row.system != system])
            held = [row for row in rows if row.system == system]
            report(held, Predictor(constants, links), f"held out: {system}")


if __name__ == "__main__":
    main()
