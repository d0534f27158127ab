"""Counts of a transformer: parameters per part and arithmetic per token."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.analytic.row import Row, Shape


@dataclass(frozen=True, slots=True)
class Parts:
    """Numbers of parameters. dense: of a layer without its experts (attention, norms, router; the MLP of a dense
    model); experts: all experts of a layer; embedding: table and learned positions; head: the projection to the
    vocabulary; norm: the last one. tied: embedding and head are one parameter."""

    dense: int
    experts: int
    embedding: int
    head: int
    norm: int
    tied: bool

    def total(self, layers: int) -> int:
        """Parameters of the whole model."""
        return layers * (self.dense + self.experts) + self.embedding + (0 if self.tied else self.head) + self.norm


def parts(shape: Shape) -> Parts:
    """GPT: LayerNorm with bias, biases everywhere, learned positions, embedding tied to the head. Llama and mixtures:
    RMSNorm, no biases, rotary positions, a head of its own."""
    h, kv, f = shape.hidden, shape.kv_width, shape.ffn
    mlp = h * f * (3 if shape.gated else 2)
    dense = h * (h + 2 * kv) + h * h
    gpt = shape.family == "gpt"
    dense += (h + 2 * kv) + h + 4 * h if gpt else 2 * h
    if shape.experts:
        dense += h * shape.experts
    else:
        dense += mlp + (f + h if gpt else 0)
    return Parts(
        dense=dense,
        experts=shape.experts * mlp,
        embedding=shape.vocab * h + (shape.seq_len * h if gpt else 0),
        head=shape.vocab * h,
        norm=2 * h if gpt else h,
        tied=gpt,
    )


def model_flops_per_token(shape: Shape) -> float:
    """Forward and backward, without recomputation: 6 per parameter that multiplies (head included, embedding not) and
    12 layers x hidden x sequence for attention, masked half counted as well.

    The convention of PaLM (Chowdhery et al. 2022, appendix B) and of Korthikanti et al. 2022 (equation 7), and so of
    Megatron-Core, NeMo and llm-foundry.
    """
    h, kv = shape.hidden, shape.kv_width
    mlp = h * shape.ffn * (3 if shape.gated else 2) * shape.top_k
    layer = h * (h + 2 * kv) + h * h + mlp + h * shape.experts
    return 6.0 * (shape.layers * layer + shape.vocab * h) + 12.0 * shape.layers * h * shape.seq_len


def recomputed_flops_per_token(row: Row, shape: Shape) -> float:
    """What recomputation adds: the layers' forward again (full), or attention's (selective). With it "model" becomes
    "hardware" FLOPs, the convention of Megatron-LM's 2021 tables."""
    if row.recompute == "none":
        return 0.0
    attention = 4.0 * shape.layers * shape.hidden * shape.seq_len
    if row.recompute == "selective":
        return attention
    return (model_flops_per_token(shape) - 6.0 * shape.vocab * shape.hidden - 3 * attention) / 3 + attention


def layers_of_chunks(row: Row, shape: Shape) -> list[int]:
    """Layers of every chunk (stage x interleave) in the order of the model: as given, or as even as can be with the
    ends shorter, since they also hold the embedding and the head."""
    chunks = row.pp * row.interleave
    given = list(row.layers_per_stage)
    if len(given) == chunks:
        return given
    if given:  # per stage, shared by its chunks; the first ones take what is left over
        return [_share(given[c % row.pp], row.interleave, c // row.pp) for c in range(chunks)]
    low, extra = divmod(shape.layers, chunks)
    counts = [low] * chunks
    first = (chunks - extra + 1) // 2
    for chunk in range(first, first + extra):
        counts[chunk] += 1
    return counts


def _share(total: int, parts_: int, index: int) -> int:
    return total // parts_ + (index < total % parts_)
