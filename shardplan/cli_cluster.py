"""``shardplan cluster detect | show | list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

cluster_app = typer.Typer(help="What there is to run on.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@cluster_app.command("detect")
def cluster_detect(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write a cluster file")] = None,
    json: Json = False,
) -> None:
    """Describe this machine."""
    from shardplan.planner.cluster import Cluster

    found = Cluster.detect()
    if output:
        found.save(output)
    if json:
        print_json(_cluster_data(found))
        return
    print(found.summary())
    if not output:
        print(found.to_toml().rstrip())


@cluster_app.command("show")
def cluster_show(
    devices: Annotated[str, typer.Argument(help="a cluster file, a preset, or devices")], json: Json = False
) -> None:
    """Show a cluster as a cluster file."""
    from shardplan.planner.cluster import Cluster

    found = Cluster.parse(devices)
    if json:
        print_json(_cluster_data(found))
        return
    print(f"# {found.summary()}")
    print(found.to_toml().rstrip())


@cluster_app.command("list")
def cluster_list(json: Json = False) -> None:
    """List the shipped presets."""
    from shardplan.planner.presets import preset_kinds, preset_nodes
    from shardplan.planner.units import format_nbytes

    if json:
        kinds = {name: {"memory_bytes": kind.memory_nbytes} for name, kind in sorted(preset_kinds().items())}
        print_json({"devices": kinds, "nodes": {name: node.summary() for name, node in sorted(preset_nodes().items())}})
        return
    print("devices:")
    for name, kind in sorted(preset_kinds().items()):
        print(f"  {name:16} {format_nbytes(kind.memory_nbytes)}")
    print("nodes:")
    for name, node in sorted(preset_nodes().items()):
        print(f"  {name:16} {node.summary()}")


def print_json(data: dict[str, Any]) -> None:
    """The one object of a ``--json``."""
    import json

    print(json.dumps({"schema": 1, **data}, indent=1))


def _cluster_data(cluster: Any) -> dict[str, Any]:
    devices = [
        {"kind": d.kind.name, "node": d.node, "memory_bytes": d.kind.memory_nbytes, "here": d.local or None}
        for d in cluster.devices
    ]
    return {"summary": cluster.summary(), "devices": devices, "file": cluster.to_toml()}
