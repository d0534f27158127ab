"""What one GPU can prove: op prices, whole steps on one device, and stages of plans for clusters that are not here.

    make bench-gpu                                    # about 20 minutes; needs no network
    python -m benchmarks.gpu --device cpu --small     # seconds, to try the suite
    python -m benchmarks.gpu steps stages             # some of its parts

Parts: ``profile`` measures the op grid that the package ships for this kind of GPU (`benchmarks/profile_gpu.py`);
``steps`` compares predicted with measured steps and memory of single-device models, and the rewritten graph with the
eager module and `torch.compile`; ``stages`` runs stages of 7B to 70B models one at a time, the other ranks made up;
``ranks`` computes a step of two and four ranks on the one GPU, in turn, and compares loss and gradients with one
device. Every part is a process of its own with a limit, and results are written after each row.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.records import FOLDER, Checked, Target, read, write

PARTS = ("profile", "steps", "stages", "ranks")
_MINUTES = {"profile": 7.0, "steps": 6.0, "stages": 5.0, "ranks": 2.0}


def main() -> int:
    arguments = _arguments()
    if arguments.inside:
        _run(arguments)
        return 0
    failed = []
    for part in arguments.parts or PARTS:
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu", part, "--inside", "--device", arguments.device]
        command += ["--small"] if arguments.small else []
        command += ["--kind", arguments.kind] if arguments.kind else []
        command += ["-o", str(arguments.output), "--repeats", str(arguments.repeats)]
        try:
            status = subprocess.run(command, timeout=60 * _MINUTES[part]).returncode
        except subprocess.TimeoutExpired:
            status = 124
        said = "done" if status == 0 else "ran out of time" if status == 124 else f"ended with status {status}"
        print(f"{part}: {said} after {time.monotonic() - started:.0f} s", flush=True)
        failed += [part] if status else []
    for target in targets(read(arguments.output).get("parts", {})):
        print(f"{'  ' if target.met else 'X '}{target}")
    return 1 if failed else 0


def _run(arguments: argparse.Namespace) -> None:
    """One part, in this process."""
    import torch

    part, device = arguments.parts[0], torch.device(arguments.device)
    rows = []
    parts = read(arguments.output).get("parts", {})
    for row in _rows(part, device, arguments):
        rows.append(row)
        print(_line(row), flush=True)
        kept = {**parts, part: {"device": _name(device), "torch": torch.__version__, "rows": rows}}
        write(arguments.output, "gpu", targets(kept), parts=kept)


def _rows(part: str, device: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from benchmarks.profile_gpu import kind_of

    kind = arguments.kind or (kind_of(_name(device)) if device.type == "cuda" else "h100")
    if part == "profile":
        yield _profile(kind, device, arguments)
    elif part == "steps":
        from benchmarks.gpu import steps

        yield from steps.rows(device, arguments.small, arguments.repeats)
    elif part == "stages":
        from benchmarks.gpu import stages

        yield from stages.rows(device, kind, arguments.small, arguments.repeats)
    else:
        from benchmarks.gpu import ranks

        yield from ranks.rows(device)


def _profile(kind: str, device: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The op grid, into the package on a GPU, and nowhere on a CPU."""
    script = Path(__file__).parent.parent / "profile_gpu.py"
    command = [sys.executable, str(script), "--device", str(device), "--kind", kind, "--budget", "330"]
    command += ["--tiny"] if arguments.small else []
    command += ["-o", "/dev/null"] if device.type == "cpu" else []
    found = subprocess.run(command, capture_output=True, text=True)
    return {"name": kind, "said": found.stdout.strip()} if found.returncode == 0 else {
        "name": kind, "error": found.stderr.strip().splitlines()[-1] if found.stderr else "no output"
    }  # fmt: skip


def _name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _line(row: dict[str, Any]) -> str:
    name = " ".join(str(row[key]) for key in ("name", "degrees", "stage") if key in row)
    if "error" in row:
        return f"{name}: {row['error']}"
    if "said" in row:
        return f"{name}: {row['said']}"
    if "seconds" in row:
        ours = row["seconds"]["ours"]
        others = ", ".join(f"{k} {1e3 * v:.1f}" for k, v in row["seconds"].items() if k != "ours")
        return (
            f"{name}: predicted {1e3 * row['predicted_seconds']:.1f} ms, measured {1e3 * ours:.1f} ms ({others}); "
            f"predicted {row['predicted_nbytes'] / 2**30:.2f} GiB, measured {row['nbytes'] / 2**30:.2f} GiB"
        )
    if "measured" in row:
        times = ", ".join(f"{k} {1e3 * v:.2f} / {1e3 * row['measured'][k]:.2f} ms" for k, v in row["predicted"].items())
        sizes = f"{row['predicted_nbytes'] / 2**30:.2f} / {row['nbytes'] / 2**30:.2f} GiB"
        return f"{name}: predicted / measured: {times}; {sizes}"
    return f"{name}: relative error of the loss {row['loss_error']:.1e}, of gradients {row['gradient_error']:.1e}"


def targets(parts: dict[str, Any]) -> list[Checked]:
    """What the rows that are there show."""
    found = []
    steps = [row for row in parts.get("steps", {}).get("rows", ()) if "error" not in row]
    if steps:
        errors = [abs(row["predicted_seconds"] / row["seconds"]["ours"] - 1) for row in steps]
        sizes = [abs(row["predicted_nbytes"] / row["nbytes"] - 1) for row in steps if row["nbytes"]]
        found.append(Target("median error of step seconds on one device", 0.07).check(statistics.median(errors)))
        found += [Target("median error of peak memory", 0.03).check(statistics.median(sizes))] if sizes else []
        ratios = [row["seconds"]["ours"] / row["seconds"]["eager"] for row in steps]
        found.append(Target("rewritten graph against eager, worst ratio", 1.05).check(max(ratios)))
    stages = [row for row in parts.get("stages", {}).get("rows", ()) if "error" not in row]
    if stages:
        errors = [abs(sum(row["predicted"].values()) / sum(row["measured"].values()) - 1) for row in stages]
        found.append(Target("median error of a stage's compute", 0.07).check(statistics.median(errors)))
    ranks = [row for row in parts.get("ranks", {}).get("rows", ()) if "error" not in row]
    if ranks:
        worst = max(max(row["loss_error"], row["gradient_error"]) for row in ranks)
        found.append(Target("worst error of several ranks against one device", 1e-4).check(worst))
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kind", help="name of the preset; default: by the device's name")
    parser.add_argument("--small", action="store_true", help="small models, to try the suite")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER / "gpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
