"""Encoders: masked language models and other heads, with padding masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.models import BATCH, SEQUENCE, Case, bert, encoder, padding_mask, ragged_labels, tokens
from tests.zoo.decoders import SIZES, WORDS
from tests.zoo.registry import entries

ENCODER: dict[str, Any] = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSES = 4


def build(family: str, head: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, family + head)(getattr(transformers, family + "Config")(**settings))


def masked(family: str, **settings: Any) -> Case:
    """A masked language model that computes its own loss, under a padding mask."""
    ids = tokens(WORDS, BATCH, SEQUENCE)
    batch = {"input_ids": ids, "attention_mask": padding_mask(BATCH, SEQUENCE), "labels": ragged_labels(ids)}
    return Case(build(family, "ForMaskedLM", **settings), batch)


def labelled(family: str, head: str, labels: Callable[[], torch.Tensor], **settings: Any) -> Case:
    """An encoder with another head of its own loss; labels: makes the labels of the batch."""
    batch = {
        "input_ids": tokens(WORDS, BATCH, SEQUENCE),
        "attention_mask": padding_mask(BATCH, SEQUENCE),
        "labels": labels(),
    }
    return Case(build(family, head, num_labels=CLASSES, **settings), batch)


def classes() -> torch.Tensor:
    return torch.randint(0, CLASSES, (BATCH,))


def roberta() -> Case:
    """Positions counted from the padding by a cumulative sum."""
    return masked("Roberta", **ENCODER)


def xlm_roberta() -> Case:
    """Sequence classification by the first token."""
    return labelled("XLMRoberta", "ForSequenceClassification", classes, **ENCODER, classifier_dropout=0.0)


def bert_tokens() -> Case:
    """Token classification with ragged labels."""
    labels = lambda: ragged_labels(torch.randint(0, CLASSES, (BATCH, SEQUENCE)))  # noqa: E731
    return labelled("Bert", "ForTokenClassification", labels, **ENCODER)


def bert_regression() -> Case:
    """A classification head with real-valued labels: mean squared error."""
    return labelled("Bert", "ForSequenceClassification", lambda: torch.randn(BATCH, CLASSES), **ENCODER)


def bert_multilabel() -> Case:
    """Several labels per sample: binary cross entropy with logits."""
    labels = lambda: torch.randint(0, 2, (BATCH, CLASSES)).to(torch.float32)  # noqa: E731
    return labelled("Bert", "ForSequenceClassification", labels, **ENCODER)


def bert_spans() -> Case:
    """Question answering: start and end positions, two losses averaged."""
    batch = {
        "input_ids": tokens(WORDS, BATCH, SEQUENCE),
        "attention_mask": padding_mask(BATCH, SEQUENCE),
        "start_positions": torch.randint(0, 6, (BATCH,)),
        "end_positions": torch.randint(6, 13, (BATCH,)),
    }
    return Case(build("Bert", "ForQuestionAnswering", **ENCODER), batch)


def albert() -> Case:
    """One layer's weights used by all layers; factorised embeddings."""
    return masked("Albert", **ENCODER, embedding_size=16, classifier_dropout_prob=0.0)


def electra() -> Case:
    """Small embeddings projected up."""
    return masked("Electra", **ENCODER, embedding_size=16)


def electra_discriminator() -> Case:
    """Replaced-token detection: binary cross entropy over the positions that a mask selects."""
    return labelled(
        "Electra",
        "ForPreTraining",
        lambda: torch.randint(0, 2, (BATCH, SEQUENCE)),
        **ENCODER,
        embedding_size=16,
    )


def distilbert() -> Case:
    """No token types; attention scores masked by filling."""
    settings = {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return masked("DistilBert", **settings, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0)


def deberta() -> Case:
    """Disentangled attention over contents and relative positions."""
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
    return masked("Deberta", **ENCODER, **more, type_vocab_size=0)


def deberta_v2() -> Case:
    """Disentangled attention with log-bucketed positions and shared keys."""
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True}
    return masked("DebertaV2", **ENCODER, **more, type_vocab_size=0, norm_rel_ebd="layer_norm")


def mpnet() -> Case:
    """Relative position bias shared by the layers."""
    return masked("MPNet", **ENCODER)


def roformer() -> Case:
    """Rotary positions in an encoder."""
    return masked("RoFormer", **ENCODER, embedding_size=32, rotary_value=False)


def modernbert() -> Case:
    """Fused query-key-value, gated mlps, global and local layers with rotary positions."""
    more = {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
    dropout = {"embedding_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0}
    return masked("ModernBert", **SIZES, **more, **dropout)


def mobilebert() -> Case:
    """Bottlenecks, stacked feed-forwards and norms without statistics."""
    more = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2}
    return masked("MobileBert", **ENCODER, **more)


def squeezebert() -> Case:
    """Pointwise grouped convolutions in place of linear layers."""
    groups = {f"{name}_groups": 2 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
    return masked("SqueezeBert", **ENCODER, embedding_size=32, **groups)


def convbert() -> Case:
    """Span-based dynamic convolution beside attention."""
    more = {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3, "num_groups": 1}
    return masked("ConvBert", **ENCODER, **more)


def fnet() -> Case:
    """Fourier transforms in place of attention."""
    ids = tokens(WORDS, BATCH, SEQUENCE)
    return Case(build("FNet", "ForMaskedLM", **ENCODER), {"input_ids": ids, "labels": ragged_labels(ids)})


def funnel() -> Case:
    """Pooled sequences with relative attention and a decoder that upsamples."""
    more = {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "num_decoder_layers": 1}
    quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return masked("Funnel", vocab_size=WORDS, **more, **quiet)


def xlnet() -> Case:
    """Two-stream relative attention written in einsums; a loss over all positions."""
    ids = tokens(WORDS, BATCH, SEQUENCE)
    settings = {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0}
    batch = {"input_ids": ids, "labels": ragged_labels(ids)}
    return Case(build("XLNet", "LMHeadModel", **settings, summary_last_dropout=0.0), batch)


def longformer() -> Case:
    """Banded attention in overlapping chunks with a global first token."""
    case = masked("Longformer", **ENCODER, attention_window=[4, 4])
    case.batch["global_attention_mask"] = torch.eye(1, SEQUENCE, dtype=torch.int64).repeat(BATCH, 1)
    return case


def big_bird() -> Case:
    """Block-sparse model in its full-attention form."""
    return masked("BigBird", **ENCODER, attention_type="original_full", use_bias=True)


def nystromformer() -> Case:
    """Attention approximated by landmarks and an iterated pseudo-inverse."""
    ids = tokens(WORDS, BATCH, SEQUENCE)
    settings = {"num_landmarks": 4, "segment_means_seq_len": SEQUENCE, "conv_kernel_size": 3}
    return Case(
        build("Nystromformer", "ForMaskedLM", **ENCODER, **settings), {"input_ids": ids, "labels": ragged_labels(ids)}
    )


def yoso() -> Case:
    """Attention by expected hash collisions."""
    return masked("Yoso", **ENCODER, use_expectation=True, conv_window=3)


def rembert() -> Case:
    """Decoupled input and output embeddings."""
    return masked("RemBert", **ENCODER, input_embedding_size=16, output_embedding_size=24, classifier_dropout_prob=0.0)


def ibert() -> Case:
    """Integer-only layers in their floating form."""
    return masked("IBert", **ENCODER)


def layoutlm() -> Case:
    """Tokens with boxes on a page."""
    case = masked("LayoutLM", **ENCODER, max_2d_position_embeddings=64)
    corners = torch.randint(0, 32, (BATCH, SEQUENCE, 2))
    case.batch["bbox"] = torch.cat([corners, corners + torch.randint(1, 31, (BATCH, SEQUENCE, 2))], -1)
    return case


def canine() -> Case:
    """Characters hashed into embeddings, downsampled by strided convolutions."""
    more = {"num_hash_functions": 2, "num_hash_buckets": 32, "downsampling_rate": 4, "local_transformer_stride": 8}
    settings = {k: v for k, v in ENCODER.items() if k != "vocab_size"}
    labels = lambda: torch.randint(0, CLASSES, (BATCH, SEQUENCE))  # noqa: E731
    case = labelled("Canine", "ForTokenClassification", labels, **settings, **more)
    del case.batch["attention_mask"]  # a chunk of padding alone gives NaN
    return case


ENTRIES = entries(
    "encoders",
    bert,
    bert_tokens,
    bert_regression,
    bert_multilabel,
    bert_spans,
    roberta,
    xlm_roberta,
    albert,
    electra,
    electra_discriminator,
    distilbert,
    deberta,
    deberta_v2,
    mpnet,
    roformer,
    modernbert,
    mobilebert,
    squeezebert,
    convbert,
    fnet,
    funnel,
    xlnet,
    longformer,
    big_bird,
    nystromformer,
    yoso,
    rembert,
    ibert,
    layoutlm,
    canine,
    encoder,
    transformers=True,
    single=("canine",),  # its attention is not finite in fp64
)
