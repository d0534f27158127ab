"""State-space models, linear attention and their hybrids."""

from __future__ import annotations

from tests.models import BATCH, SEQUENCE, Case, ragged_labels, tokens
from tests.zoo.decoders import GROUPED, WORDS, causal
from tests.zoo.registry import entries


def mamba() -> Case:
    """Selective scan, step by step over the sequence."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 4}
    return causal("Mamba", **settings, time_step_rank=4)


def mamba2() -> Case:
    """State-space duality in chunks, with heads and gated norms."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8}
    return causal("Mamba2", **settings, head_dim=8, expand=2, n_groups=2, chunk_size=4, conv_kernel=4)


def falcon_mamba() -> Case:
    """Selective scan with normalised step sizes and states."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 4}
    return causal("FalconMamba", **settings, time_step_rank=4)


def rwkv() -> Case:
    """Time mixing with exponential decay, written as a loop."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    return causal("Rwkv", **settings, attention_hidden_size=32, intermediate_size=64)


def recurrent_gemma() -> Case:
    """Gated linear recurrences between layers of local attention."""
    more = {"lru_width": 32, "attention_window_size": 8, "conv1d_width": 4, "block_types": ["recurrent", "attention"]}
    settings = {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}
    return causal("RecurrentGemma", **settings, **more, w_init_variance_scale=0.01)


def jamba() -> Case:
    """Selective scans, attention and experts in turn."""
    more = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    state = {"num_experts": 4, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    return causal("Jamba", **GROUPED, **more, **state, experts_implementation="batched_mm")


def bamba() -> Case:
    """State-space duality and attention in turn."""
    state = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_n_groups": 2}
    return causal("Bamba", **GROUPED, **state, attn_layer_indices=[1])


def zamba2() -> Case:
    """State-space duality with shared attention blocks and their adapters."""
    state = {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 4, "mamba_headdim": 8}
    more = {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4, "use_mem_rope": True}
    return causal("Zamba2", **GROUPED | {"num_key_value_heads": 4}, **state, **more)


def falcon_h1() -> Case:
    """State-space duality beside attention in every layer."""
    state = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
    return causal("FalconH1", **GROUPED, **state, mamba_chunk_size=4, head_dim=8)


def qwen3_next() -> Case:
    """Gated delta rule and gated attention in turn, with routed experts."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    more = {"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16}
    return causal("Qwen3Next", **GROUPED, **linear, **more, **kinds, head_dim=8, experts_implementation="batched_mm")


def lfm2() -> Case:
    """Gated short convolutions between layers of attention."""
    return causal("Lfm2", **GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)


def minimax() -> Case:
    """Lightning (linear) attention and softmax attention in turn, with experts."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "block_size": 4, "head_dim": 8}
    return causal("MiniMax", **GROUPED, **kinds, num_local_experts=4, experts_implementation="batched_mm")


def xlstm() -> Case:
    """Matrix memory with exponential gates, in chunks."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
    return causal("xLSTM", **settings, chunk_size=8, mode="train")


def granitemoehybrid() -> Case:
    """State-space duality and attention with a shared mlp and experts."""
    state = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_n_groups": 2}
    more = {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
    return causal("GraniteMoeHybrid", **GROUPED, **state, **more, shared_intermediate_size=32)


def reformer() -> Case:
    """Local attention in reversible layers with axial positions."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8}
    more = {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "feed_forward_size": 64}
    axial = {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "max_position_embeddings": 64}
    from transformers import ReformerConfig, ReformerModelWithLMHead

    quiet = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "is_decoder": True}
    ids = tokens(WORDS, BATCH, SEQUENCE)
    model = ReformerModelWithLMHead(ReformerConfig(**settings, **more, **axial, **quiet))
    return Case(model, {"input_ids": ids, "labels": ragged_labels(ids)})


ENTRIES = entries(
    "state_space",
    mamba,
    mamba2,
    falcon_mamba,
    rwkv,
    recurrent_gemma,
    jamba,
    bamba,
    zamba2,
    falcon_h1,
    qwen3_next,
    lfm2,
    minimax,
    xlstm,
    granitemoehybrid,
    reformer,
    single=("granitemoehybrid",),
    transformers=True,
)
