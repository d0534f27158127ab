"""Encoder-decoders, each with its own loss over ragged labels."""

from __future__ import annotations

from typing import Any

from tests.models import BATCH, SEQUENCE, Case, padding_mask, ragged_labels, t5, tokens
from tests.zoo.decoders import WORDS
from tests.zoo.encoders import build
from tests.zoo.registry import entries

TARGETS = 12
BART: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}


def translation(family: str, **settings: Any) -> Case:
    """A conditional generator, which computes its own loss, with padded sources and ragged targets."""
    batch = {
        "input_ids": tokens(WORDS, BATCH, SEQUENCE),
        "attention_mask": padding_mask(BATCH, SEQUENCE),
        "labels": ragged_labels(tokens(WORDS, BATCH, TARGETS)),
    }
    return Case(build(family, "MTModel" if family == "Marian" else "ForConditionalGeneration", **settings), batch)


def bart() -> Case:
    """Learned positions, norms behind the sublayers, tied embeddings with a bias on the logits."""
    return translation("Bart", **BART)


def mbart() -> Case:
    """Norms before the sublayers; the decoder starts with the last token of the target, gathered per sample."""
    return translation("MBart", **BART)


def pegasus() -> Case:
    """Fixed sinusoidal positions."""
    return translation("Pegasus", **BART)


def marian() -> Case:
    """Sinusoidal positions, shared source and target vocabularies."""
    return translation("Marian", **BART, decoder_vocab_size=WORDS)


def m2m_100() -> Case:
    """Sinusoidal positions counted from the padding."""
    return translation("M2M100", **BART)


def blenderbot() -> Case:
    """Deep decoder over a shallow encoder."""
    return translation("Blenderbot", **BART | {"encoder_layers": 1})


def led() -> Case:
    """Banded encoder attention, full decoder attention."""
    settings = {k: v for k, v in BART.items() if k != "max_position_embeddings"}
    more = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": [4, 4]}
    return translation("LED", **settings, **more)


def mt5() -> Case:
    """Gated mlps, untied head."""
    return translation("MT5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def umt5() -> Case:
    """A relative position bias in every layer."""
    return translation("UMT5", **T5)


def longt5() -> Case:
    """Local attention in blocks in the encoder."""
    return translation("LongT5", **T5, encoder_attention_type="local", local_radius=3)


def switch_transformers() -> Case:
    """T5 with one routed expert per token in sparse layers."""
    more = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}
    return translation("SwitchTransformers", **T5, **more, num_decoder_layers=2, router_jitter_noise=0.0)


def prophetnet() -> Case:
    """A decoder with streams for the next two tokens."""
    settings = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "ngram": 2,
        "num_buckets": 8,
        "relative_max_distance": 16,
    }
    return translation("ProphetNet", **settings)


def t5gemma() -> Case:
    """Gemma 2 blocks as encoder and decoder with cross attention."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    module = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dropout_rate": 0.0,
    }
    config = T5GemmaConfig(
        encoder=module, decoder=module, vocab_size=WORDS, dropout_rate=0.0, attn_implementation="eager"
    )
    # Without a mask: a window that holds padding alone gives NaN.
    batch = {"input_ids": tokens(WORDS, BATCH, SEQUENCE), "labels": ragged_labels(tokens(WORDS, BATCH, TARGETS))}
    return Case(T5GemmaForConditionalGeneration(config), batch)


ENTRIES = entries(
    "encoder_decoders",
    t5,
    mt5,
    umt5,
    longt5,
    bart,
    mbart,
    pegasus,
    marian,
    m2m_100,
    blenderbot,
    led,
    prophetnet,
    switch_transformers,
    t5gemma,
    transformers=True,
    single=("prophetnet", "t5gemma"),  # not finite in fp64
)
