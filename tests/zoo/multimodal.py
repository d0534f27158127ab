"""Text with images: contrastive pairs, captioning and question answering."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case, padding_mask, ragged_labels, tokens
from tests.zoo.registry import entries

WORDS, LENGTH = 96, 8

_TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": WORDS - 1,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def _pairs() -> dict[str, Any]:
    ids = tokens(WORDS - 1, BATCH, LENGTH)
    ids[:, -1] = WORDS - 1
    return {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 16, 16), "return_loss": True}


def clip() -> Case:
    """Two towers whose loss compares every image of the batch with every text."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
    return Case(CLIPModel(config), _pairs() | {"attention_mask": padding_mask(BATCH, LENGTH)})


def siglip() -> Case:
    """Two towers with a sigmoid loss over all pairs of the batch and attention pooling."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(text_config=_TEXT | {"max_position_embeddings": LENGTH}, vision_config=_VISION)
    return Case(SiglipModel(config), _pairs())


def blip() -> Case:
    """A text decoder that attends to image features; own captioning loss."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = _TEXT | {
        "encoder_hidden_size": 32,
        "label_smoothing": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = BlipConfig(text_config=text, vision_config=_VISION, projection_dim=16, image_text_hidden_size=32)
    batch = _pairs() | {"attention_mask": padding_mask(BATCH, LENGTH)}
    del batch["return_loss"]
    return Case(BlipForConditionalGeneration(config), batch | {"labels": ragged_labels(batch["input_ids"])})


def vilt() -> Case:
    """One transformer over words and patches; answers are several labels at once."""
    from transformers import ViltConfig, ViltForQuestionAnswering

    settings = _TEXT | _VISION | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViltConfig(**settings, num_labels=12, max_image_length=-1)
    model = ViltForQuestionAnswering(config)
    ids = tokens(WORDS, BATCH, LENGTH)
    return Case(
        model,
        {
            "input_ids": ids,
            "attention_mask": padding_mask(BATCH, LENGTH),
            "token_type_ids": torch.zeros_like(ids),
            "pixel_values": torch.randn(BATCH, 3, 16, 16),
            "pixel_mask": torch.ones(BATCH, 16, 16, dtype=torch.long),
            "labels": torch.rand(BATCH, 12),
        },
    )


def llava() -> Case:
    """Image features scattered into the token embeddings of a decoder at the places of a special token."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    image_token, patches = WORDS - 1, 16
    text = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=text,
        image_token_index=image_token,
        image_seq_length=patches,
        vision_feature_layer=-1,
    )
    words = tokens(WORDS - 1, BATCH, LENGTH)
    ids = torch.cat([words[:, :2], torch.full((BATCH, patches), image_token), words[:, 2:]], 1)
    labels = ragged_labels(ids)
    labels[ids == image_token] = -100
    batch = {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": labels}
    return Case(LlavaForConditionalGeneration(config), batch)


class Captioner(nn.Module):
    """Image patches as a prefix of the sequence (the places are fixed), one decoder, loss on the text only."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.vision = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.embed = nn.Embedding(WORDS, width)
        self.decoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, 16, 16]; ids: [batch, seq] -> logits [batch, seq, words]; the head is the embedding."""
        features = self.project(self.vision(self.patches(image).flatten(2).mT))
        x = torch.cat([features, self.embed(ids)], 1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = self.decoder(x, mask=mask, is_causal=True)[:, features.shape[1] :]
        return F.linear(x, self.embed.weight)


def _next_token(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, WORDS), target[:, 1:].reshape(-1))


def captioner() -> Case:
    """Hand-written prefix captioner with tied embeddings."""
    ids = tokens(WORDS, BATCH, LENGTH)
    return Case(
        Captioner(), {"image": torch.randn(BATCH, 3, 16, 16), "ids": ids, "target": ragged_labels(ids)}, _next_token
    )


ENTRIES = entries("multimodal", clip, siglip, blip, vilt, llava, captioner, transformers=True)
