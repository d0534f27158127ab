"""How well the sum of measured ops predicts a training step of the whole model on one CPU core.

    PYTHONPATH=. python benchmarks/op_prediction.py    # the byte GPT of the demo: width 384, 8 layers
    PYTHONPATH=. python benchmarks/op_prediction.py --rounds 5 --ops

Every round measures all ops anew and then some steps of the model (forward and backward, no optimizer), so that both
see the same machine; the medians over the rounds are compared. Both are in seconds of CPU time: other processes on the
machine lengthen that less than wall time. --ops prints where the predicted time is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.placement import Mesh
from shardplan.planner.rules import local_call
from shardplan.planner.trace import Trace, infos, resolve
from tests.models import ByteGPT, token_loss

ONE = Mesh(("dp", "tp"), (1, 1))


def main() -> None:
    arguments = _arguments()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if arguments.core is None else arguments.core})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteGPT(arguments.width, arguments.heads, arguments.layers, 256, arguments.sequence)
    ids = torch.randint(0, 256, (arguments.batch, arguments.sequence))
    trace = trace_model(model, (ids,), {}, loss_fn=token_loss, target=ids)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        token_loss(model(ids), ids).backward()

    step()
    predicted, measured, totals = [], [], defaultdict(list)
    for _ in range(arguments.rounds):
        by_op, costs = predict(trace)
        measured += [_seconds(step) for _ in range(arguments.steps)]
        predicted.append(sum(map(sum, by_op.values())))
        for name, seconds in by_op.items():
            totals[name].append(seconds)
        middle = statistics.median(measured[-arguments.steps :])
        print(f"predicted {predicted[-1]:.4f} s, measured {middle:.4f} s, measuring took {costs.profile_seconds:.1f} s")
    a, b = statistics.median(predicted), statistics.median(measured)
    print(f"median: predicted {a:.4f} s, measured {b:.4f} s, predicted / measured = {a / b:.3f}")
    if arguments.ops:
        for name, seconds in sorted(totals.items(), key=lambda item: -sum(map(sum, item[1]))):
            forward, backward = (statistics.median(side) for side in zip(*seconds, strict=True))
            print(f"  {name:50s} {forward * 1e3:9.2f} ms forward {backward * 1e3:9.2f} ms backward")


def predict(trace: Trace) -> tuple[dict[str, tuple[float, float]], CostModel]:
    """Forward and backward seconds of one step by op, all measured anew, and the model that measured them."""
    cluster = Cluster.cpu(1)
    costs = CostModel(cluster, LinkModel(cluster), None, measure=True, budget_seconds=60.0)
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for node in trace.nodes():
        if node.op == "call_function" and resolve(node)[0] is node and infos(node):
            cost = costs.op(local_call(node, {}, ONE), 0)
            forward, backward = found[str(node.target)]
            found[str(node.target)] = (forward + cost.forward_seconds, backward + cost.backward_seconds)
    return dict(found), costs


def _seconds(action: Callable[[], None]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--core", type=int, default=None, help="the core to run on (default: the last one)")
    parser.add_argument("--ops", action="store_true", help="print the predicted seconds by op")
    return parser.parse_args()


if __name__ == "__main__":
    main()
