"""Bytes of a rank: parameters, gradients, optimizer state, saved activations.

Per layer and microbatch the forward keeps, with T tokens, e bytes an element, t tensor-parallel ranks (Korthikanti et
al. 2022, section 4, derived here per op so that grouped queries, gates and experts follow):

    ==============================  ===========================================  =====================
    kept                            bytes                                        split
    ==============================  ===========================================  =====================
    inputs of both norms            2 e T h                                      sequence parallel only
    input of query/key/value        e T h                                        sequence parallel only
    query, key, value               e T (h + 2 kv)                               t
    scores, dropout's mask, result  (2 e + 1) T s a (dropout), e T s a           t; absent if fused
    log-sum-exp of fused attention  4 T a                                        t; instead of scores
    input of the projection         e T h                                        t
    masks of two dropouts           2 T h (GPT)                                  sequence parallel only
    input of the MLP                e T h (x top_k in a mixture)                 sequence parallel only
    activation's input              e T f (2 e T f gated) x top_k                t
    second product's input          e T f x top_k                                t
    result of the experts           e T h x top_k (mixtures)                     sequence parallel only
    ==============================  ===========================================  =====================

For GPT with f = 4 h in 16 bits that is T h (10 + 24/t + 5 a s/(h t)), the paper's equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardplan.planner.analytic.links import expert_tp
from shardplan.planner.analytic.row import Row, Shape
from shardplan.planner.analytic.shapes import parts


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bytes per parameter: of the copies that compute, of its gradient, of the optimizer with any 32-bit copy.
    gathered: of the copy that travels between replicas."""

    weight: int
    gradient: int
    optimizer: int
    gathered: int


def recipe(row: Row) -> Recipe:
    """How the precision is trained.

    bf16: 16-bit weights, gradients added up in 32 bits, a 32-bit copy and two moments (Megatron-LM's recipe, 18 bytes).
    fp16, and bf16 under ZeRO 2 and 3: 16-bit gradients (DeepSpeed, FSDP; 16 bytes). fp8: 8-bit copies of the weights
    and their transposes beside the 16-bit ones, 16-bit gradients (Transformer Engine in NeMo; 18 bytes). fp32: 16.
    """
    if row.precision == "fp32":
        return Recipe(4, 4, 8, 4)
    gradient = 2 if row.precision in ("fp16", "fp8") or row.zero >= 2 else 4
    return Recipe(4 if row.precision == "fp8" else 2, gradient, 12, 2)


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters of a rank: dense (shared by all data-parallel replicas) and of its experts."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        return self.dense + self.experts


def held(row: Row, shape: Shape, layers: int, first: bool, last: bool) -> Held:
    """Parameters of a stage's rank before any ZeRO. first, last: holds the embedding, the head."""
    count = parts(shape)
    dense = layers * count.dense
    if first:
        dense += count.embedding
    if last:
        dense += count.norm + (0 if count.tied and first else count.head)
    return Held(dense / row.tp, layers * count.experts / row.ep / expert_tp(row))


def state_nbytes(row: Row, shape: Shape, mine: Held, layers: int) -> float:
    """Parameters, gradients and optimizer of a rank. ZeRO (Rajbhandari et al. 2020): 1 shares the optimizer among the
    replicas, 2 also gradients, 3 also parameters, of which two layers at a time are whole."""
    r = recipe(row)
    replicas = row.dp * row.cp
    total = 0.0
    for params, copies in (
        (mine.dense, replicas),
        (mine.experts, max(1.0, replicas * row.tp / row.ep / expert_tp(row))),
    ):
        weight = r.weight / copies if row.zero >= 3 else r.weight
        gradient = r.gradient / copies if row.zero >= 2 else r.gradient
        optimizer = r.optimizer / copies if row.zero >= 1 else r.optimizer
        total += params * (weight + gradient + optimizer)
    if row.zero >= 2 and layers:
        whole = mine.total / layers
        total += whole * (r.gradient + (2 * r.weight if row.zero >= 3 else 0))
    return total


def layer_nbytes(row: Row, shape: Shape, flash: bool) -> float:
    """Kept by one layer from a microbatch's forward to its backward. See module docstring."""
    e = 4 if row.precision == "fp32" else 2
    products = 1 if row.precision == "fp8" else e  # inputs of products are kept as they are used
    t, h, k = row.tp, shape.hidden, shape.top_k
    spread = t if row.sequence_parallel else 1
    tokens = row.micro_batch * shape.seq_len / row.cp
    if row.recompute == "full":
        return e * tokens * h / spread
    whole = 2 * e * h + products * h + products * h * k + (2 * h if shape.dropout else 0)
    if shape.experts:
        whole += e * h * k + 4 * shape.experts
    split = e * (h + 2 * shape.kv_width) + products * h
    split += (2 if shape.gated else 1) * e * shape.ffn * k + products * shape.ffn * k
    if flash:
        split += 4 * shape.heads
    elif row.recompute != "selective":
        split += shape.heads * shape.seq_len * ((2 * e + 1) if shape.dropout else e)
    return tokens * (whole / spread + split / t)


def working_nbytes(row: Row, shape: Shape, flash: bool, last: bool) -> float:
    """The most that comes on top for a moment: a layer that is computed again, or the logits of the last stage (16-bit
    values, 32-bit ones and their gradient)."""
    e = 4 if row.precision == "fp32" else 2
    tokens = row.micro_batch * shape.seq_len / row.cp
    logits = tokens * shape.vocab / row.tp * (e + 4) if last else 0.0
    again = 0.0
    if row.recompute != "none":
        again = layer_nbytes(replace(row, recompute="none"), shape, flash) - layer_nbytes(row, shape, flash)
    # Gradients of a layer's widest values while its backward runs.
    wide = e * tokens * (2 * shape.hidden + 2 * max(shape.ffn * shape.top_k, shape.hidden) / row.tp)
    return max(logits, again + wide)


def end_nbytes(row: Row, shape: Shape, first: bool, last: bool) -> float:
    """Kept per microbatch beside the layers: the embedding's dropout mask; inputs of last norm and head."""
    e = 4 if row.precision == "fp32" else 2
    tokens = row.micro_batch * shape.seq_len / row.cp / (row.tp if row.sequence_parallel else 1)
    mask = tokens * shape.hidden if first and shape.dropout else 0.0
    return mask + (2 * e * tokens * shape.hidden if last else 0.0)
