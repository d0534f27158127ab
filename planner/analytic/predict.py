"""A row's prediction.

    step = pipeline + gradients that are still on their way + optimizer + what a step takes beside

`pipeline` runs the schedule with the stages' seconds; a stage on mixed devices is as slow as its slowest one. Data
parallel gradients travel behind the last backwards (`System.dp_overlap`); under ZeRO 3 every microbatch gathers
the parameters of every layer twice and scatters their gradients, behind the layer's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardplan.planner.analytic import memory, pipeline, shapes
from shardplan.planner.analytic.constants import DEFAULT, Constants
from shardplan.planner.analytic.layer import (
    NOTHING,
    Seconds,
    embedding_seconds,
    head_seconds,
    layer_seconds,
    uses_flash,
)
from shardplan.planner.analytic.links import Network, network
from shardplan.planner.analytic.ops import Chip, peak_flops
from shardplan.planner.analytic.row import Row, Shape, read_row
from shardplan.planner.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Prediction:
    """tflops_per_device and mfu: model FLOPs (no recomputation; `shapes.model_flops_per_token`);
    hardware_tflops_per_device with it. mfu: of the peak in the row's precision. peak_memory_nbytes: of one rank, per
    stage. bubble_fraction: idle share of the pipeline's time. None where only a schedule was simulated."""

    id: str
    step_seconds: float
    tokens_per_second: float | None
    tflops_per_device: float | None
    hardware_tflops_per_device: float | None
    mfu: float | None
    peak_memory_nbytes: tuple[int, ...] | None
    fits: bool | None
    bubble_fraction: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON has it."""
        data: dict[str, Any] = {
            "id": self.id,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_device": self.tflops_per_device,
            "hardware_tflops_per_device": self.hardware_tflops_per_device,
            "mfu": self.mfu,
            "peak_memory_bytes": None if self.peak_memory_nbytes is None else list(self.peak_memory_nbytes),
            "fits": self.fits,
            "bubble_fraction": self.bubble_fraction,
        }
        return data | ({"notes": list(self.notes)} if self.notes else {})


def predict_row(
    data: Mapping[str, Any], cluster: Cluster | None = None, limit_nbytes: int | None = None, default_id: str = "1"
) -> dict[str, Any]:
    """The prediction of a row as JSON has it (``simulate --rows``). cluster: in place of its devices. limit_nbytes: of
    every device, in place of what it has less its reserve.

    Raises UsageError where the row is wrong.
    """
    row = read_row(data, default_id, None if cluster is None else len(cluster))
    return predict(row, cluster, DEFAULT, limit_nbytes).to_dict()


def predict(
    row: Row,
    cluster: Cluster | None = None,
    constants: Constants = DEFAULT,
    limit_nbytes: int | None = None,
) -> Prediction:
    """The prediction of a checked row. Raises UsageError where its devices are unknown or too few."""
    net: Network | None = None
    notes = row.notes
    if row.devices is not None or cluster is not None:
        net, understood = network(row, cluster)
        notes += understood
    if row.interleave > 1 and row.microbatches % row.pp:
        notes = (*notes, f"interleave: {row.microbatches} microbatches are not a multiple of pp = {row.pp}")
    if row.stage_seconds is not None:
        return _schedule_only(row, net, notes, limit_nbytes)
    assert row.shape is not None and net is not None
    shape = row.shape
    chunks = shapes.layers_of_chunks(row, shape)
    times = [_chunk(row, shape, net, constants, chunk, layers) for chunk, layers in enumerate(chunks)]
    item = 4 if row.precision == "fp32" else 2
    message = item * row.micro_batch * shape.seq_len / row.cp * shape.hidden / row.tp
    sends = [net.send(message, stage) for stage in range(row.pp)] if row.pp > 1 else [0.0]
    piped = pipeline.run(row.schedule, row.pp, row.microbatches, times, sends)
    if row.pp == 1:
        seconds = row.full_microbatches * (times[0].forward + times[0].backward)
        piped = pipeline.Piped(seconds, 0.0)
    per_stage = [_once(row, shape, net, constants, stage, chunks, times) for stage in range(row.pp)]
    step = piped.seconds + max(per_stage)
    tokens = row.global_batch * shape.seq_len
    flops = tokens * shapes.model_flops_per_token(shape)
    more = tokens * shapes.recomputed_flops_per_token(row, shape)
    peak = _peak_flops(row, net)
    nbytes = _peaks(row, shape, net, constants, chunks)
    fits = all(amount <= limit for amount, limit in zip(nbytes, _limits(row, net, limit_nbytes), strict=True))
    return Prediction(
        id=row.id,
        step_seconds=step,
        tokens_per_second=tokens / step,
        tflops_per_device=flops / step / row.ranks / 1e12,
        hardware_tflops_per_device=(flops + more) / step / row.ranks / 1e12,
        mfu=flops / step / peak,
        peak_memory_nbytes=nbytes,
        fits=fits,
        bubble_fraction=piped.idle_share,
        notes=notes,
    )


def _schedule_only(row: Row, net: Network | None, notes: tuple[str, ...], limit_nbytes: int | None) -> Prediction:
    """Given stage seconds: those of a position and microbatch; interleaved chunks share them."""
    given = row.stage_seconds
    assert given is not None
    stages = [
        Seconds(given.forward[p], given.backward_input[p], given.backward_weight[p]).times(1 / row.interleave)
        for _ in range(row.interleave)
        for p in range(row.pp)
    ]
    piped = pipeline.run(row.schedule, row.pp, row.microbatches, stages, [given.send] * row.pp)
    tokens = tflops = hardware = mfu = nbytes = fits = None
    if row.shape is not None:
        count = row.global_batch * row.shape.seq_len
        flops = count * shapes.model_flops_per_token(row.shape)
        more = count * shapes.recomputed_flops_per_token(row, row.shape)
        tokens = count / piped.seconds
        tflops = flops / piped.seconds / row.ranks / 1e12
        hardware = (flops + more) / piped.seconds / row.ranks / 1e12
        if net is not None:
            mfu = flops / piped.seconds / _peak_flops(row, net)
            nbytes = _peaks(row, row.shape, net, DEFAULT, shapes.layers_of_chunks(row, row.shape))
            fits = all(amount <= limit for amount, limit in zip(nbytes, _limits(row, net, limit_nbytes), strict=True))
    return Prediction(row.id, piped.seconds, tokens, tflops, hardware, mfu, nbytes, fits, piped.idle_share, notes)


def _chips(row: Row, net: Network, constants: Constants, stage: int) -> list[Chip]:
    return [Chip.of_kind(kind, row.precision, row.zero, constants) for kind in net.kinds(stage)]


def _chunk(row: Row, shape: Shape, net: Network, constants: Constants, chunk: int, layers: int) -> Seconds:
    """One chunk on the slowest of its stage's devices."""
    stage = chunk % row.pp
    found: list[Seconds] = []
    for chip in _chips(row, net, constants, stage):
        layer = layer_seconds(row, shape, chip, net, stage)
        if row.zero >= 3:
            layer = _gathered(row, shape, chip, net, stage, layer)
        total = layer.times(layers)
        if chunk == 0:
            total += embedding_seconds(row, shape, chip, net, stage)
        if chunk == row.pp * row.interleave - 1:
            total += head_seconds(row, shape, chip, net, stage)
        found.append(total)
    return max(found, key=lambda seconds: seconds.forward + seconds.backward, default=NOTHING)


def _gathered(row: Row, shape: Shape, chip: Chip, net: Network, stage: int, layer: Seconds) -> Seconds:
    """A layer whose parameters are gathered and whose gradients are scattered behind its arithmetic."""
    mine = memory.held(row, shape, 1, False, False)
    each = memory.recipe(row)
    gather = net.data("all_gather", each.gathered * mine.dense, stage)
    scatter = net.data("reduce_scatter", each.gradient * mine.dense, stage)
    if mine.experts:
        gather += net.expert_data("all_gather", each.gathered * mine.experts, stage)
        scatter += net.expert_data("reduce_scatter", each.gradient * mine.experts, stage)
    slack = chip.system.gather_slack
    ahead = _both(layer.forward, gather, slack)
    back = _both(layer.backward, gather + scatter, slack)
    return Seconds(ahead, layer.backward_input + back - layer.backward, layer.backward_weight)


def _both(compute: float, talk: float, slack: float) -> float:
    """Of two things at the same time."""
    return max(compute, talk) + slack * min(compute, talk)


def _once(
    row: Row, shape: Shape, net: Network, constants: Constants, stage: int, chunks: list[int], times: list[Seconds]
) -> float:
    """Seconds of a stage's gradient reduction and parameter gathering that stay visible, of its optimizer and of what a
    step takes beside.

    They hide behind the last backward and the first forward; interleaved chunks finish one after the other, each a
    pipeline's length before the next.
    """
    layers = sum(chunks[stage :: row.pp])
    mine = memory.held(row, shape, layers, stage == 0, stage == row.pp - 1)
    each = memory.recipe(row)
    replicas = row.dp * row.cp
    chips = _chips(row, net, constants, stage)
    exposed = 0.0
    if replicas > 1 and row.zero < 3:
        mine_times = times[stage :: row.pp]
        behind = min(chip.system.dp_overlap for chip in chips) * (row.pp if row.interleave > 1 else 1)
        backward = behind * sum(seconds.backward for seconds in mine_times)
        forward = behind * sum(seconds.forward for seconds in mine_times)
        if row.zero:
            exposed += max(0.0, _among_replicas("reduce_scatter", each.gradient, mine, net, stage) - backward)
            exposed += max(0.0, _among_replicas("all_gather", each.gathered, mine, net, stage) - forward)
        else:
            exposed += max(0.0, _among_replicas("all_reduce", each.gradient, mine, net, stage) - backward)
    shared = mine.total / (replicas if row.zero else 1)
    nbytes = shared * (2 * each.gradient + 2 * each.optimizer + each.weight)
    return exposed + max(chip.traffic(nbytes) + chip.system.step_seconds for chip in chips)


def _among_replicas(kind: str, item: int, mine: memory.Held, net: Network, stage: int) -> float:
    """A collective over a stage's parameters (or their gradients) among the ranks that hold the same."""
    experts = net.expert_data(kind, item * mine.experts, stage) if mine.experts else 0.0
    return net.data(kind, item * mine.dense, stage) + experts


def _peak_flops(row: Row, net: Network) -> float:
    """Of all the ranks together, in the row's precision."""
    if net.uniform is not None:
        return row.ranks * peak_flops(net.uniform, row.precision)
    return sum(peak_flops(device.kind, row.precision) for device in net.cluster.devices[: row.ranks])


def _peaks(row: Row, shape: Shape, net: Network, constants: Constants, chunks: list[int]) -> tuple[int, ...]:
    """The most bytes of a rank, per stage."""
    flash = [uses_flash(row, shape, _chips(row, net, constants, stage)[0]) for stage in range(row.pp)]
    last = len(chunks) - 1
    kept = [
        layers * memory.layer_nbytes(row, shape, flash[chunk % row.pp])
        + memory.end_nbytes(row, shape, chunk == 0, chunk == last)
        for chunk, layers in enumerate(chunks)
    ]
    held = pipeline.held_nbytes(row.schedule, row.pp, row.microbatches, kept)
    peaks = []
    for stage in range(row.pp):
        layers = sum(chunks[stage :: row.pp])
        first, end = stage == 0, stage == row.pp - 1
        state = memory.state_nbytes(row, shape, memory.held(row, shape, layers, first, end), layers)
        peaks.append(round(state + held[stage] + memory.working_nbytes(row, shape, flash[stage], end)))
    return tuple(peaks)


def _limits(row: Row, net: Network, limit_nbytes: int | None) -> list[int]:
    """Bytes that a rank of every stage may use: the least of its devices."""
    if limit_nbytes is not None:
        return [limit_nbytes] * row.pp
    size = row.ranks // row.pp
    if net.uniform is not None and len(set(net.cluster.limits)) <= 1:
        return [net.cluster.memory_limit(0)] * row.pp
    return [min(net.cluster.memory_limit(rank) for rank in range(s * size, (s + 1) * size)) for s in range(row.pp)]
