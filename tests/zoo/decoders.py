"""Decoders: Hugging Face language models from configs, each with its own causal loss."""

from __future__ import annotations

from typing import Any

from tests.models import BATCH, SEQUENCE, Case, gpt2, llama, llama_padded, padding_mask, ragged_labels, tokens
from tests.zoo.registry import entries

WORDS = 96
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
QUIET: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


def causal(family: str, head: str = "ForCausalLM", **settings: Any) -> Case:
    """The family's language model, which computes its own causal loss, on token ids whose labels end raggedly."""
    import transformers

    model = getattr(transformers, family + head)(getattr(transformers, family + "Config")(**settings))
    ids = tokens(WORDS, BATCH, SEQUENCE)
    return Case(model, {"input_ids": ids, "labels": ragged_labels(ids)})


def mistral() -> Case:
    """Sliding-window attention with grouped key-value heads."""
    return causal("Mistral", **GROUPED, sliding_window=6)


def mistral_padded() -> Case:
    """Sliding-window attention under a padding mask."""
    case = mistral()
    case.batch["attention_mask"] = padding_mask(BATCH, SEQUENCE)
    return case


def qwen2() -> Case:
    """Biased query, key and value; the first layer attends in full, the second in a window."""
    return causal("Qwen2", **GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1)


def qwen3() -> Case:
    """Normalised queries and keys per head."""
    return causal("Qwen3", **GROUPED, head_dim=8)


def gemma() -> Case:
    """One key-value head for all query heads, scaled and tied embeddings."""
    return causal("Gemma", **SIZES, num_key_value_heads=1, head_dim=8)


def gemma2() -> Case:
    """Capped scores and logits, alternating sliding and full attention, norms before and after."""
    settings = GROUPED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
    return causal("Gemma2", **settings, attn_implementation="eager")


def gemma3() -> Case:
    """Local and global attention with two rotary tables, normalised queries and keys."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings = GROUPED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**settings, layer_types=["sliding_attention", "full_attention"]))
    ids = tokens(WORDS, BATCH, SEQUENCE)
    return Case(model, {"input_ids": ids, "labels": ragged_labels(ids)})


def gpt_neox() -> Case:
    """Parallel attention and mlp, fused query-key-value by heads, rotary on a part of a head."""
    return causal("GPTNeoX", **SIZES, **QUIET)


def gpt_neo() -> Case:
    """Alternating global and local attention over learned positions."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
    more = {"max_position_embeddings": 64, "window_size": 6, "attention_types": [[["global", "local"], 1]]}
    return causal("GPTNeo", **settings, **more, embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0)


def gptj() -> Case:
    """Parallel attention and mlp, interleaved rotary positions."""
    settings = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    return causal("GPTJ", **settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def codegen() -> Case:
    """Fused query-key-value in blocks of model-parallel shards."""
    settings = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    return causal("CodeGen", **settings, n_ctx=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def gpt_bigcode() -> Case:
    """Multi-query attention with one fused query-key-value weight."""
    settings = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": True}
    return causal("GPTBigCode", **settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def starcoder2() -> Case:
    """Sliding window, grouped key-value heads, biased layers."""
    more = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    return causal("Starcoder2", **GROUPED, sliding_window=6, **more)


def falcon() -> Case:
    """Multi-query attention beside the mlp, fused weights."""
    return causal("Falcon", **SIZES, **QUIET, multi_query=True, parallel_attn=True, bias=False)


def falcon_alibi() -> Case:
    """Falcon with linear biases in place of rotary positions."""
    return causal("Falcon", **SIZES, **QUIET, alibi=True, new_decoder_architecture=False, multi_query=False)


def bloom() -> Case:
    """Linear attention biases, layer norm behind the embedding, fused query-key-value by heads."""
    settings = {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return causal("Bloom", **settings, hidden_dropout=0.0, attention_dropout=0.0)


def mpt() -> Case:
    """Linear attention biases, fused query-key-value, no biases."""
    return causal("Mpt", vocab_size=WORDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2)


def opt() -> Case:
    """Learned positions with an offset, ReLU mlps."""
    more = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    return causal("OPT", **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, **more)


def olmo() -> Case:
    """Layer norms without parameters, clipped queries, keys and values."""
    return causal("Olmo", **GROUPED, clip_qkv=4.0)


def olmo2() -> Case:
    """Norms behind the sublayers; queries and keys normalised over all heads."""
    return causal("Olmo2", **GROUPED)


def phi() -> Case:
    """Parallel attention and mlp, rotary on half a head, normalised queries."""
    more = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "qk_layernorm": True}
    return causal("Phi", **SIZES, **more, partial_rotary_factor=0.5)


def phi3() -> Case:
    """Fused query-key-value with grouped heads, fused gate and up."""
    return causal("Phi3", **GROUPED, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)


def granite() -> Case:
    """Scaled embeddings, residuals, scores and logits."""
    more = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
    return causal("Granite", **GROUPED, **more, logits_scaling=2.0)


def cohere() -> Case:
    """Parallel sublayers on one norm, interleaved rotary positions, scaled logits, tied embeddings."""
    return causal("Cohere", **GROUPED)


def cohere2() -> Case:
    """Three windows and a layer without positions."""
    return causal("Cohere2", **GROUPED | {"num_hidden_layers": 4}, sliding_window=6, sliding_window_pattern=4)


def stablelm() -> Case:
    """Rotary on a quarter of a head, layer norms per query head."""
    more = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "qk_layernorm": True}
    return causal("StableLm", **GROUPED, **more, partial_rotary_factor=0.5)


def persimmon() -> Case:
    """Fused query-key-value by heads with normalised queries and keys, squared ReLU."""
    return causal("Persimmon", **SIZES, **QUIET, partial_rotary_factor=0.5)


def nemotron() -> Case:
    """Layer norms with 1 + weight, squared ReLU."""
    return causal("Nemotron", **GROUPED, head_dim=8, **QUIET)


def glm4() -> Case:
    """Interleaved partial rotary positions, fused gate and up, norms on both sides."""
    return causal("Glm4", **GROUPED, head_dim=8, partial_rotary_factor=0.5, attention_dropout=0.0)


def smollm3() -> Case:
    """Rotary positions in some of the layers only."""
    return causal("SmolLM3", **GROUPED, no_rope_layers=[1, 0])


def exaone4() -> Case:
    """Hybrid of local attention with rotary and global attention without positions."""
    kinds = ["sliding_attention", "full_attention"]
    return causal("Exaone4", **GROUPED, head_dim=8, sliding_window=6, sliding_window_pattern=2, layer_types=kinds)


def diffllama() -> Case:
    """Differential attention: the difference of two attention maps, normalised by head."""
    return causal("DiffLlama", **GROUPED)


def biogpt() -> Case:
    """Learned positions computed from the mask by a cumulative sum."""
    more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0}
    return causal("BioGpt", **SIZES, **more)


def xglm() -> Case:
    """Sinusoidal positions with an offset."""
    settings = {"vocab_size": WORDS, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}
    more = {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    return causal("XGLM", **settings, **more)


def ctrl() -> Case:
    """Sinusoidal positions, attention written out."""
    settings = {"vocab_size": WORDS, "n_positions": 64, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}
    return causal("CTRL", "LMHeadModel", **settings, resid_pdrop=0.0, embd_pdrop=0.0)


ENTRIES = entries(
    "decoders",
    llama,
    llama_padded,
    gpt2,
    mistral,
    mistral_padded,
    qwen2,
    qwen3,
    gemma,
    gemma2,
    gemma3,
    gpt_neox,
    gpt_neo,
    gptj,
    codegen,
    gpt_bigcode,
    starcoder2,
    falcon,
    falcon_alibi,
    bloom,
    mpt,
    opt,
    olmo,
    olmo2,
    phi,
    phi3,
    granite,
    cohere,
    cohere2,
    stablelm,
    persimmon,
    nemotron,
    glm4,
    smollm3,
    exaone4,
    diffllama,
    biogpt,
    xglm,
    ctrl,
    single=("xglm",),
    transformers=True,
)
