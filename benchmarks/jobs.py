"""Training jobs of different shape for benchmarks that run: small enough for one core a rank, large enough to time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_byte_gpt import ByteGPT

Made = tuple[nn.Module, Any, Callable[..., Any] | None]
"""Model, global batch (input, target) or keyword inputs, loss function or None."""


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _gpt(layers: int, width: int, heads: int, batch: int, seq: int) -> Made:
    ids = torch.randint(256, (batch, seq))
    return ByteGPT(layers=layers, width=width, heads=heads), (ids, ids), token_loss


def wide(batch: int = 4, length: int = 64) -> Made:
    """A decoder with few wide layers and few tokens: parameters weigh more than activations."""
    return _gpt(2, 768, 12, batch, length)


def deep(batch: int = 16, length: int = 128) -> Made:
    """A decoder with many narrow layers and many tokens: activations weigh more."""
    return _gpt(12, 128, 4, batch, length)


def usual(batch: int = 8, length: int = 128) -> Made:
    """A decoder in between."""
    return _gpt(4, 384, 6, batch, length)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


def images(batch: int = 16, length: int = 32) -> Made:
    """A residual network of convolutions. length: of an image's side."""
    body = [_Residual(48) for _ in range(6)]
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    )
    return model, (torch.randn(batch, 3, length, length), torch.randint(10, (batch,))), F.cross_entropy


def experts(batch: int = 8, length: int = 64) -> Made:
    """A small mixture of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, use_cache=False,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    ids = torch.randint(512, (batch, length))
    return MixtralForCausalLM(config), {"input_ids": ids, "labels": ids}, None


def translation(batch: int = 8, length: int = 96) -> Made:
    """An encoder with a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=512, d_model=192, d_kv=32, d_ff=512, num_layers=4, num_heads=6, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 512, (batch, length))
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}, None


JOBS: dict[str, Callable[..., Made]] = {job.__name__: job for job in (wide, deep, usual, images, experts, translation)}


def make(name: str) -> Made:
    """The job of that name, the same on every rank: "usual", or with another batch "usual@4", or with another batch and
    length "usual@8x32"."""
    torch.manual_seed(0)
    kind, _, size = name.partition("@")
    return JOBS[kind](*map(int, size.split("x"))) if size else JOBS[kind]()
