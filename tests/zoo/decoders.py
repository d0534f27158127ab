"""Decoders: Hugging Face language models from configs, each with its own causal loss."""

from __future__ import annotations

from typing import Any

from tests.models import BATCH, SEQUENCE, Case, gpt2, llama, llama_padded, ragged_labels, tokens
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


def language(model: Any) -> Case:
    """A model that computes its own causal loss, on token ids whose labels end raggedly."""
    ids = tokens(WORDS, BATCH, SEQUENCE)
    return Case(model, {"input_ids": ids, "labels": ragged_labels(ids)})


def mistral() -> Case:
    """Sliding-window attention with grouped key-value heads."""
    from transformers import MistralConfig, MistralForCausalLM

    return language(MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)))


ENTRIES = entries("decoders", llama, llama_padded, gpt2, mistral, transformers=True)
