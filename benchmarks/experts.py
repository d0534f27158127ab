"""Configurations that experts published, out of ``benchmarks/published``, and their models on the meta device."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import search_models
from torch import nn
from tracing import Shape, build

from shardplan.runtime.meta import meta_model

PUBLISHED = Path(__file__).parent / "published"
_PRESETS = {"a100-80g": "dgx-a100", "h100": "dgx-h100", "b200": "hgx-b200"}
_SLOWER = {("a100-80g", "400 Gbit/s"): "p4de"}
_TABLES: dict[str, tuple[str, ...]] = {
    "megatron_2021": ("1.7B", "3.6B", "7.5B", "18.4B", "39.1B", "76.1B", "145.6B", "310.1B", "529.6B", "1008.0B"),
    "megatron_deepspeed": ("530B 2240", "BLOOM"),
    "llama3": ("405B 8k GPUs", "405B 16k GPUs, 128k tokens"),
    "nemo_h100": ("gpt3-175b 512", "llama2-70b 64"),
    "nemo_b200": ("mixtral-8x7b 64",),
    "automodel_h100": ("deepseek-v3 256", "qwen3-30b 8"),
    "moe_h100": ("qwen3-235b 256 tp2 pp1 ep8", "qwen3-235b 256 tp2 pp8 ep32"),
    "dgxc_grok_h100": ("grok1-314b 512",),
}
"""Table -> ids of its rows that are compared: of rows that differ in the number of devices or the precision alone, one.
What is published for FP8 is compared in bfloat16, both plans."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One published configuration. dp: replicas of the whole model, expert parallelism inside them or across; ep: ranks
    of a replica of the experts; recompute: of every block; zero: storage level; chunks: stages of a pipeline rank."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    batch: int
    nodes: str
    devices: int
    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    micro_batch: int
    recompute: bool
    zero: int
    chunks: int
    experts: int
    top_k: int

    @property
    def microbatches(self) -> int:
        return self.batch // self.dp // self.micro_batch

    def inexpressible(self) -> str:
        """Why no plan of ours is this one; empty where one is."""
        if self.cp > 1:
            return f"context parallelism of {self.cp} is an axis of its own"
        if self.ep > 1 and self.tp > 1 and self.ep != self.tp:
            return f"experts are split over {self.ep} ranks, all else over {self.tp}"
        if self.dp * self.tp % self.ep:
            return f"experts are split over {self.ep} ranks of {self.dp * self.tp}"
        return ""

    def degrees(self) -> dict[str, int]:
        """The same in our mesh. Experts are split over the axis "tp", on which all else may be split along heads,
        hidden features or the sequence."""
        tp = max(self.tp, self.ep)
        return {"dp": self.dp * self.tp // tp, "tp": tp, "pp": self.pp}

    def outside(self) -> str:
        """What the published run did otherwise than the plan that stands for it here."""
        told = [f"{self.chunks} chunks a rank"] if self.chunks > 1 else []
        if self.ep > 1 and self.tp == 1:
            told.append("tokens travel all-to-all, attention is split by samples")
        return ", ".join(told)


def experts() -> dict[str, Expert]:
    """The configurations, by name."""
    found = {}
    for table, wanted in _TABLES.items():
        data = tomllib.loads((PUBLISHED / f"{table}.toml").read_text())
        for values in data["rows"]:
            row = {**data["common"], **dict(zip(data["columns"], values, strict=True))}
            row |= data.get("models", {}).get(row.get("model"), {})
            name = _name(table, row)
            if name in wanted and name not in found:
                found[name] = _expert(name, row)
    return found


def _name(table: str, row: dict[str, Any]) -> str:
    if "id" in row:
        return row["id"]
    degrees = f" tp{row['tp']} pp{row['pp']} ep{row['ep']}" if table == "moe_h100" else ""
    return f"{row.get('model', 'qwen3-235b')} {row['gpus']}{degrees}"


def _expert(name: str, row: dict[str, Any]) -> Expert:
    tp, pp, cp = row.get("tp", 1), row.get("pp", 1), row.get("cp", 1)
    devices = row["gpus"] if "gpus" in row else row["dp"] * tp * pp * cp
    slower = _SLOWER.get((row["kind"], row.get("inter_node_bandwidth", "")))
    return Expert(
        name=name,
        family="deepseek" if name.startswith("deepseek") else row["family"],
        layers=row["layers"],
        hidden=row["hidden"],
        heads=row["heads"],
        kv_heads=row.get("kv_heads", row["heads"]),
        ffn=row.get("ffn", 4 * row["hidden"]),
        vocab=row["vocab"],
        seq=row["seq_len"],
        batch=row["global_batch"],
        nodes=slower or _PRESETS[row["kind"]],
        devices=devices,
        dp=devices // (tp * pp * cp),
        tp=tp,
        pp=pp,
        cp=cp,
        ep=row.get("ep", 1),
        micro_batch=row["micro_batch"],
        recompute=row.get("recompute") == "full",
        zero=row.get("zero", 0),
        chunks=row.get("interleave", 1),
        experts=row.get("experts", 0),
        top_k=row.get("top_k", 0),
    )


def model_of(expert: Expert) -> nn.Module:
    """On the meta device, in bfloat16, ready to train."""
    if expert.family == "deepseek":
        return search_models.model_of(search_models.Row("deepseek", expert.devices, expert.batch, expert.seq))
    if expert.family == "llama":
        shape = Shape(expert.layers, expert.hidden, expert.ffn, expert.heads, expert.kv_heads, expert.vocab)
        return meta_model(lambda: build(shape, expert.seq)).train()
    return meta_model(lambda: (_mixture if expert.family == "moe" else _gpt)(expert).bfloat16()).train()


def _mixture(expert: Expert) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=expert.vocab,
        hidden_size=expert.hidden,
        intermediate_size=expert.ffn,
        num_hidden_layers=expert.layers,
        num_attention_heads=expert.heads,
        num_key_value_heads=expert.kv_heads,
        num_local_experts=expert.experts,
        num_experts_per_tok=expert.top_k,
        max_position_embeddings=expert.seq,
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    return MixtralForCausalLM(config)


def _gpt(expert: Expert) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    shape = {"n_positions": expert.seq, "n_embd": expert.hidden, "n_layer": expert.layers, "n_head": expert.heads}
    return GPT2LMHeadModel(GPT2Config(vocab_size=expert.vocab, **shape, **off))
