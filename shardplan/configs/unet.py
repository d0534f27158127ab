"""The denoising U-Net of latent diffusion models (Rombach et al. 2022), built from a configuration: residual blocks of
convolutions with the timestep added, self and cross attention over pixels, skips from the way down to the way up.

Field names are those of the published config.json files of such models, so that these work as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TOKENS = 77
"""Of the text encoder that these models listen to."""


@dataclass(frozen=True, slots=True)
class Config:
    """channels per level, top first; attention: which levels have it; attention_head_dim: NUMBER of heads per level
    (the published files name it so); transformer_layers: per level."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    norm_num_groups: int = 32
    use_linear_projection: bool = False

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Config:
        """From the fields of a config.json; a single number stands for all levels. Raises ValueError."""
        plain = Config()
        levels = len(settings.get("block_out_channels", plain.block_out_channels))
        known = {field.name for field in fields(Config)}
        given: dict[str, Any] = {name: value for name, value in settings.items() if name in known}
        if "down_block_types" in settings:
            given["attention"] = ["CrossAttn" in name for name in settings["down_block_types"]]
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            value = given.get(name, getattr(plain, name)[0])
            given[name] = value if isinstance(value, (list, tuple)) else [value] * levels
        given.setdefault("attention", [True] * (levels - 1) + [False])
        for name in ("attention", "attention_head_dim", "transformer_layers_per_block"):
            if len(given[name]) != levels:
                raise ValueError(f"{name} names {len(given[name])} levels, block_out_channels {levels}")
        for name, value in given.items():
            if isinstance(value, list):
                given[name] = tuple(value)
        return Config(**given)


class Residual(nn.Module):
    """Two convolutions with group norm; the timestep is added between them."""

    def __init__(self, inner: int, outer: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x: [batch, inner, height, width]; time: [batch, time] -> [batch, outer, height, width]."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Of x [batch, length, width] to source [batch, words, context]."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self attention, attention to the text, a gated mlp; each behind a norm and beside a skip."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context, heads)
        self.norm3, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), text)
        value, gate = self.up(self.norm3(x)).chunk(2, -1)
        return x + self.down(value * F.gelu(gate))


class Transformer(nn.Module):
    """Layers over the pixels of an image."""

    def __init__(self, width: int, level: int, config: Config) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1) for _ in range(2)
        )
        heads, count = config.attention_head_dim[level], config.transformer_layers_per_block[level]
        self.layers = nn.ModuleList(Layer(width, config.cross_attention_dim, heads) for _ in range(count))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """image: [batch, width, h, w]; text: [batch, words, context] -> as image."""
        x = self.norm(image)
        x = self.proj_in(x.flatten(2).mT) if self.linear else self.proj_in(x).flatten(2).mT
        for layer in self.layers:
            x = layer(x, text)
        if self.linear:
            return image + self.proj_out(x).mT.reshape(image.shape)
        return image + self.proj_out(x.mT.reshape(image.shape))


class Block(nn.Module):
    """A residual block and, where the level has it, attention."""

    def __init__(self, inner: int, outer: int, level: int, config: Config, attention: bool) -> None:
        super().__init__()
        time = 4 * config.block_out_channels[0]
        self.residual = Residual(inner, outer, time, config.norm_num_groups)
        self.attention = Transformer(outer, level, config) if attention else None

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.residual(x, time)
        return self.attention(x, text) if self.attention is not None else x


class UNet(nn.Module):
    """Predicts the noise in an image that was mixed with noise."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths, time = config.block_out_channels, 4 * config.block_out_channels[0]
        self.time_embedding = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.lower = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        last = len(widths) - 1
        for level, wider in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(config.layers_per_block):
                blocks.append(Block(width, wider, level, config, config.attention[level]))
                width = wider
                skips.append(width)
            self.down.append(blocks)
            self.lower.append(nn.Conv2d(width, width, 3, stride=2, padding=1) if level < last else nn.Identity())
            skips += [width] * (level < last)
        self.middle = nn.ModuleList((Block(width, width, last, config, True), Block(width, width, last, config, False)))
        self.up = nn.ModuleList()
        self.upper = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = nn.ModuleList()
            for _ in range(config.layers_per_block + 1):
                blocks.append(Block(width + skips.pop(), widths[level], level, config, config.attention[level]))
                width = widths[level]
            self.up.append(blocks)
            self.upper.append(nn.Conv2d(width, width, 3, padding=1) if level else nn.Identity())
        self.norm_out = nn.GroupNorm(config.norm_num_groups, width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """sample: [batch, channels, h, w]; timestep: int64 [batch]; encoder_hidden_states: [batch, words, context] ->
        the noise, as sample."""
        angles = timestep_embedding(timestep, self.config.block_out_channels[0]).to(sample.dtype)
        time, text = self.time_embedding(angles), encoder_hidden_states
        x = self.conv_in(sample)
        skips = [x]
        last = len(self.down) - 1
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time, text)
                skips.append(x)
            if level < last:
                x = self.lower[level](x)
                skips.append(x)
        for block in self.middle:
            x = block(x, time, text)
        for step, blocks in enumerate(self.up):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(torch.cat([x, skips.pop()], 1), time, text)
            if step < last:
                x = self.upper[step](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def timestep_embedding(timestep: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines and sines of timestep [batch] -> float32 [batch, width]."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=timestep.device) / (width // 2))
    angles = timestep[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


def build(settings: Mapping[str, Any]) -> UNet:
    """The model of a config.json. Raises ValueError."""
    return UNet(Config.of(settings))


def shapes(
    model: UNet, dtype: torch.dtype, batch: int, seq: int | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """A global training batch: latents, timesteps, `seq` words of text (77) and the noise to predict."""
    config = model.config
    latents = (batch, config.in_channels, config.sample_size, config.sample_size)
    return {
        "sample": (dtype, latents),
        "timestep": (torch.int64, (batch,)),
        "encoder_hidden_states": (dtype, (batch, seq or TOKENS, config.cross_attention_dim)),
        "target": (dtype, (batch, config.out_channels, *latents[2:])),
    }


loss_fn = F.mse_loss
