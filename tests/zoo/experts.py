"""Mixtures of experts: decoders that route tokens, with auxiliary losses where the family has one."""

from __future__ import annotations

from typing import Any

from tests.models import Case, mixtral
from tests.zoo.decoders import GROUPED, SIZES, WORDS, causal
from tests.zoo.registry import entries

BATCHED: dict[str, Any] = {"experts_implementation": "batched_mm"}
GROUPS: dict[str, Any] = {"experts_implementation": "grouped_mm"}


def mixtral_balanced() -> Case:
    """With the load-balancing loss of the router, over padded tokens none."""
    return causal("Mixtral", **GROUPED, **BATCHED, num_local_experts=4, output_router_logits=True)


def mixtral_grouped() -> Case:
    """Experts as one grouped matrix product over sorted tokens."""
    return causal("Mixtral", **GROUPED, **GROUPS, num_local_experts=4)


def qwen2_moe() -> Case:
    """Routed experts beside a gated shared expert."""
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return causal("Qwen2Moe", **GROUPED, **BATCHED, **more, shared_expert_intermediate_size=32)


def qwen3_moe() -> Case:
    """Renormalised top-2 routing, normalised queries and keys."""
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return causal("Qwen3Moe", **GROUPED, **BATCHED, **more, head_dim=8)


def deepseek_v2() -> Case:
    """Latent attention and shared experts."""
    return causal("DeepseekV2", **_deepseek(), **BATCHED, topk_method="greedy", n_group=1, topk_group=1)


def deepseek_v3() -> Case:
    """Latent attention, sigmoid routing in groups with a correction bias, a dense first layer."""
    return causal("DeepseekV3", **_deepseek(), **BATCHED, n_group=2, topk_group=1)


def _deepseek() -> dict[str, Any]:
    return SIZES | {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "rope_interleave": False,
    }


def gpt_oss() -> Case:
    """Attention sinks, sliding windows, clamped gated experts with biases."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    return causal("GptOss", **GROUPED, **BATCHED, **more, rope_parameters=plain, attn_implementation="eager")


def olmoe() -> Case:
    """Top-2 of 4 experts, normalised queries and keys."""
    return causal("Olmoe", **GROUPED, **BATCHED, num_experts=4, num_experts_per_tok=2)


def granitemoe() -> Case:
    """Experts with fused inputs, scaled residuals and logits."""
    return causal("GraniteMoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2)


def phimoe() -> Case:
    """Sparse-mixer routing with a gradient of its own."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    return causal("Phimoe", **GROUPED, **BATCHED, **more)


def jetmoe() -> Case:
    """Routed attention heads as well as routed mlps."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2}
    more = {"kv_channels": 8, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    return causal("JetMoe", **settings, **more)


def dbrx() -> Case:
    """Fine-grained experts, clipped fused query-key-value."""
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "attn_pdrop": 0.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.0}
    settings = {"vocab_size": WORDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    return causal("Dbrx", **settings, attn_config=attention, ffn_config=experts, resid_pdrop=0.0, emb_pdrop=0.0)


def glm4_moe() -> Case:
    """Sigmoid routing with a correction bias beside a shared expert."""
    more = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    return causal("Glm4Moe", **GROUPED, **BATCHED, **more, head_dim=8, n_group=1, topk_group=1)


def ernie4_5_moe() -> Case:
    """Shared and routed experts with interleaved rotary positions."""
    more = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
    return causal("Ernie4_5_Moe", **GROUPED, **BATCHED, **more, moe_num_shared_experts=1)


def llama4() -> Case:
    """One expert per token beside a shared one, chunked attention."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from tests.models import BATCH, SEQUENCE, ragged_labels, tokens

    more = {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": 8}
    config = Llama4TextConfig(**GROUPED, **more, interleave_moe_layer_step=2)
    ids = tokens(WORDS, BATCH, SEQUENCE)
    return Case(Llama4ForCausalLM(config), {"input_ids": ids, "labels": ragged_labels(ids)})


ENTRIES = entries(
    "experts",
    mixtral,
    mixtral_balanced,
    mixtral_grouped,
    qwen2_moe,
    qwen3_moe,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    olmoe,
    granitemoe,
    phimoe,
    jetmoe,
    dbrx,
    glm4_moe,
    ernie4_5_moe,
    llama4,
    single=("mixtral_grouped", "granitemoe"),
    transformers=True,
)
