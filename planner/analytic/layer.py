"""Seconds of a transformer layer and of the ends of the model, on one rank, forward and backward.

Per layer and microbatch, with T tokens on the rank, t tensor-parallel ranks, h hidden, f feed-forward width:

* matrix products [T, h] x [h, (h + 2 kv)/t], [T, h/t] x [h/t, h], and those of the MLP; backward has two of each, by
  the input and by the weight;
* attention; norms, residuals, dropout and activations as traffic;
* two all-reduces of [T, h] forward and two backward among the t ranks, or with sequence parallelism as many pairs of
  all-gather and reduce-scatter, and one more all-gather backward that hides behind a product.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.analytic.links import Network, expert_tp
from shardplan.planner.analytic.ops import Chip
from shardplan.planner.analytic.row import Row, Shape


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one microbatch. backward_input holds what the previous layer waits for (recomputation included),
    backward_weight what can be put off."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def backward(self) -> float:
        return self.backward_input + self.backward_weight

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )

    def times(self, count: float) -> Seconds:
        return Seconds(self.forward * count, self.backward_input * count, self.backward_weight * count)


NOTHING = Seconds(0.0, 0.0, 0.0)


def uses_flash(row: Row, shape: Shape, chip: Chip) -> bool:
    """Whether attention is fused. Not said: GPUs since Hopper and Llama-like models do, those before 16-bit brain
    floats cannot."""
    if shape.flash is not None:
        return shape.flash
    if "bf16" not in chip.kind.flops:
        return False
    return shape.family != "gpt" or "fp8" in chip.kind.flops


def layer_seconds(row: Row, shape: Shape, chip: Chip, net: Network, stage: int) -> Seconds:
    """One layer. See module docstring."""
    flash = uses_flash(row, shape, chip)
    t, h, kv = row.tp, shape.hidden, shape.kv_width
    tokens = row.micro_batch * shape.seq_len / row.cp
    local = tokens / (t if row.sequence_parallel else 1)
    heads, dim = shape.heads / t, shape.head_dim
    queries = shape.seq_len / row.cp
    core = chip.attention(row.micro_batch, heads, queries, shape.seq_len, dim, flash)
    core_backward = chip.attention_backward(row.micro_batch, heads, queries, shape.seq_len, dim, flash)
    ring = net.context(chip.item * 2 * tokens * row.cp * kv / t, stage)
    core += max(0.0, ring - core)
    core_backward += max(0.0, 2 * ring - core_backward)

    shapes = [((h + 2 * kv) / t, h), (h, h / t)]  # (columns, inner)
    forward = sum(chip.product(tokens, n, k) for n, k in shapes)
    by_input = sum(chip.product(tokens, k, n) for n, k in shapes)
    by_weight = sum(chip.product(k, n, tokens) for n, k in shapes)
    mlp = _experts(row, shape, chip, net, stage) if shape.experts else _mlp(row, shape, chip)

    forward_traffic, backward_traffic = _traffic(row, shape, chip, tokens, local)
    pair = _tensor_parallel(row, chip.item * tokens * h, net, stage)
    pairs = 1 if shape.experts else 2  # the experts count their own
    system = chip.system
    ahead = forward + mlp.forward + core + forward_traffic + pairs * pair * (1 - system.tp_overlap)
    back = by_input + mlp.backward_input + core_backward + backward_traffic
    back += pairs * pair * (1 - system.tp_overlap_backward)
    if row.recompute == "full":
        back += ahead
    elif row.recompute == "selective":
        back += core
    return Seconds(ahead, back, by_weight + mlp.backward_weight)


def _tensor_parallel(row: Row, nbytes: float, net: Network, stage: int) -> float:
    """Seconds of what one half of a layer makes the tensor-parallel ranks say in one direction."""
    if row.tp == 1:
        return 0.0
    if row.sequence_parallel:
        return net.tensor("all_gather", nbytes, stage) + net.tensor("reduce_scatter", nbytes, stage)
    return net.tensor("all_reduce", nbytes, stage)


def _mlp(row: Row, shape: Shape, chip: Chip) -> Seconds:
    tokens = row.micro_batch * shape.seq_len / row.cp
    width = shape.ffn / row.tp
    shapes = [(width * (2 if shape.gated else 1), shape.hidden), (shape.hidden, width)]
    return Seconds(
        sum(chip.product(tokens, n, k) for n, k in shapes),
        sum(chip.product(tokens, k, n) for n, k in shapes),
        sum(chip.product(k, n, tokens) for n, k in shapes),
    )


def _experts(row: Row, shape: Shape, chip: Chip, net: Network, stage: int) -> Seconds:
    """A mixture: router, tokens to their experts and back, grouped products.

    A rank sends the tokens that are its own, top_k times, by all-to-all to the ranks of their experts; where experts
    are split, the ranks that split one gather them there and scatter the sums.
    """
    tokens = row.micro_batch * shape.seq_len / row.cp
    split = expert_tp(row)
    own = tokens / (row.tp if row.sequence_parallel or split == 1 else 1)
    sent = own * shape.top_k * chip.imbalance
    # Tokens that the rank's experts compute: those of all the ranks that share an expert's split.
    routed = tokens * shape.top_k * chip.imbalance / (row.tp / split)
    owned = shape.experts / row.ep
    rows = routed / owned
    width = shape.ffn / split
    shapes = [(width * (2 if shape.gated else 1), shape.hidden), (shape.hidden, width)]
    item = chip.item * shape.hidden
    move = 2 * net.expert(item * sent, stage, shape.top_k) + 2 * chip.traffic(2 * item * sent)
    if split > 1:
        gathered = _tensor_parallel(row, item * routed, net, stage)
        move += gathered * (1 - chip.system.tp_overlap_backward)
    router = chip.product(tokens, shape.experts, shape.hidden, high=True)
    return Seconds(
        sum(chip.product(rows, n, k, owned) for n, k in shapes) + move + router,
        sum(chip.product(rows, k, n, owned) for n, k in shapes) + move + 2 * router,
        sum(chip.product(k, n, rows, owned) for n, k in shapes),
    )


def _traffic(row: Row, shape: Shape, chip: Chip, tokens: float, local: float) -> tuple[float, float]:
    """Forward and backward seconds of norms, residuals with dropout, rotary positions and activations."""
    e, h, system = chip.item, shape.hidden, chip.system
    mask = 1 if shape.dropout else 0
    width = shape.ffn * shape.top_k / row.tp
    norm, norm_back = 2 * e * local * h, 3 * e * local * h
    residual, residual_back = (3 * e + mask) * local * h, (2 * e + mask) * local * h
    rotary = 0.0 if shape.family == "gpt" else 2 * e * tokens * (h + shape.kv_width) / row.tp
    active = (3 if shape.gated else 2) * e * tokens * width
    active_back = (5 if shape.gated else 3) * e * tokens * width
    ahead = 2 * chip.traffic(norm) + 2 * chip.traffic(residual) + chip.traffic(rotary) + chip.traffic(active)
    back = 2 * chip.traffic(norm_back) + 2 * chip.traffic(residual_back) + chip.traffic(rotary)
    back += chip.traffic(active_back)
    return ahead * system.pointwise_forward, back * system.pointwise_backward


def embedding_seconds(row: Row, shape: Shape, chip: Chip, net: Network, stage: int) -> Seconds:
    """Lookup of the rank's part of the table and the sum over parts; backward writes a gradient of the whole part."""
    tokens, e, h = row.micro_batch * shape.seq_len / row.cp, chip.item, shape.hidden
    rows = chip.traffic(2 * e * tokens * h)
    pair = _tensor_parallel(row, e * tokens * h, net, stage)
    table = e * shape.vocab * h / row.tp
    return Seconds(2 * rows + pair, 0.0, 2 * rows + chip.traffic(2 * table))


def head_seconds(row: Row, shape: Shape, chip: Chip, net: Network, stage: int) -> Seconds:
    """Last norm, projection to the vocabulary, cross entropy in 32 bits."""
    tokens, h, columns = row.micro_batch * shape.seq_len / row.cp, shape.hidden, shape.vocab / row.tp
    entropy = chip.traffic(20 * tokens * columns)
    gather = _tensor_parallel(row, chip.item * tokens * h, net, stage) / (2 if row.sequence_parallel else 1)
    return Seconds(
        chip.product(tokens, columns, h, high=True) + entropy + (gather if row.sequence_parallel else 0.0),
        chip.product(tokens, h, columns, high=True) + chip.traffic(8 * tokens * columns) + gather,
        chip.product(h, columns, tokens, high=True),
    )
