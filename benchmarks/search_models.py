"""The models of ``benchmarks/search.py``: published shapes on the meta device, and what a step takes.

Llama 3: arXiv 2407.21783, table 3. GPT-3 175B: arXiv 2005.14165, table 2.1. Mixtral 8x22B: its published
configuration. DeepSeek-V3: arXiv 2412.19437, section 4.2 (without the multi-token head). ViT-22B: arXiv 2302.05442,
table 1 (sequential blocks). T5-11B: arXiv 1910.10683, section 3.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tracing import SHAPES, build

from shardplan.runtime.meta import meta_model


@dataclass(frozen=True, slots=True)
class Row:
    """batch: sequences (or images) a step; seq: tokens of one."""

    model: str
    devices: int
    batch: int
    seq: int


MIXTURES = ("mixtral", "deepseek")
"""Models with experts."""
ROWS = {
    f"{row.model}@{row.devices}": row
    for row in (
        Row("8b", 8, 64, 8192),
        Row("8b", 64, 512, 8192),
        Row("70b", 64, 512, 8192),
        Row("70b", 512, 2048, 8192),
        Row("405b", 512, 2048, 8192),
        Row("405b", 4096, 2048, 8192),
        Row("405b", 16384, 2048, 8192),
        Row("mixtral", 256, 1024, 4096),
        Row("mixtral", 2048, 4096, 4096),
        Row("deepseek", 256, 2048, 4096),
        Row("deepseek", 2048, 8192, 4096),
        Row("vit", 256, 4096, 257),
        Row("gpt3", 1024, 1536, 2048),
        Row("t5", 64, 2048, 512),
    )
}


def model_of(row: Row) -> nn.Module:
    """On the meta device, in bfloat16, ready to train."""
    made = SHAPES.get(row.model)
    if made is not None:
        return meta_model(lambda: build(made, row.seq)).train()
    return meta_model(lambda: _BUILDERS[row.model](row.seq).bfloat16()).train()


def inputs_of(row: Row) -> dict[str, Tensor]:
    """The whole batch of a step, on the meta device."""
    if row.model == "vit":
        images = torch.empty((row.batch, 3, 224, 224), dtype=torch.bfloat16, device="meta")
        return {"pixel_values": images, "labels": torch.empty((row.batch,), dtype=torch.int64, device="meta")}
    ids = torch.empty((row.batch, row.seq), dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids}


def _gpt3(seq: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_positions": seq, "n_embd": 12288, "n_layer": 96, "n_head": 96}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50257, use_cache=False, **shape, **off))


def _mixtral(seq: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=seq,
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    return MixtralForCausalLM(config)


def _deepseek(seq: int) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        max_position_embeddings=seq,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    return DeepseekV3ForCausalLM(config)


def _vit(seq: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48, "intermediate_size": 24576}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(image_size=224, patch_size=14, num_labels=1000, **shape, **off))


def _t5(seq: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_heads": 128, "num_layers": 24}
    shape["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(T5Config(vocab_size=32128, dropout_rate=0.0, use_cache=False, **shape))


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "gpt3": _gpt3,
    "mixtral": _mixtral,
    "deepseek": _deepseek,
    "vit": _vit,
    "t5": _t5,
}
