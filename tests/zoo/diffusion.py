"""Denoising networks: a U-Net with cross attention, and a transformer with modulated norms."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case
from tests.zoo.registry import entries


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of t [batch] -> [batch, width]."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResidualBlock(nn.Module):
    """Two convolutions with group norm; the timestep shifts and scales the second."""

    def __init__(self, inner: int, outer: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(time, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x: [batch, inner, h, w]; time: [batch, time] -> [batch, outer, h, w]."""
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


class CrossAttention(nn.Module):
    """Self attention over pixels, then attention to the context, then a gated mlp."""

    def __init__(self, width: int, context: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.q = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(n, 2 * width, bias=False) for n in (width, context))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def attend(self, index: int, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        def split(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.kv[index](source).chunk(2, -1)
        y = F.scaled_dot_product_attention(split(self.q[index](x)), split(k), split(v))
        return self.out[index](y.transpose(1, 2).flatten(2))

    def forward(self, image: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """image: [batch, width, h, w]; context: [batch, words, context] -> as image."""
        x = self.norm(image).flatten(2).mT
        y = self.norms[0](x)
        x = x + self.attend(0, y, y)
        x = x + self.attend(1, self.norms[1](x), context)
        value, gate = self.up(self.norms[2](x)).chunk(2, -1)
        x = x + self.down(value * F.gelu(gate))
        return image + x.mT.reshape(image.shape)


class DiffusionUNet(nn.Module):
    """Latent diffusion: residual blocks, cross attention at the lower scale, nearest upsampling, skips."""

    def __init__(self, width: int = 16, context: int = 16, time: int = 32) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.down1 = ResidualBlock(width, width, time)
        self.lower = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2, self.attend2 = ResidualBlock(width, 2 * width, time), CrossAttention(2 * width, context)
        self.middle = ResidualBlock(2 * width, 2 * width, time)
        self.up2, self.attend_up = ResidualBlock(4 * width, 2 * width, time), CrossAttention(2 * width, context)
        self.upper = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up1 = ResidualBlock(2 * width, width, time)
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """noisy: [batch, 4, h, w]; t: [batch] int64; context: [batch, words, context] -> predicted noise."""
        time = self.time(timestep_embedding(t, self.width).to(noisy.dtype))
        a = self.down1(self.first(noisy), time)
        b = self.attend2(self.down2(self.lower(a), time), context)
        x = self.middle(b, time)
        x = self.attend_up(self.up2(torch.cat([x, b], 1), time), context)
        x = self.upper(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.last(self.up1(torch.cat([x, a], 1), time))


def _noisy(extent: int = 8) -> dict[str, torch.Tensor]:
    return {"noisy": torch.randn(BATCH, 4, extent, extent), "t": torch.randint(0, 1000, (BATCH,))}


def diffusion_unet() -> Case:
    """Noise prediction by a U-Net with text context."""
    batch = _noisy() | {"context": torch.randn(BATCH, 6, 16), "target": torch.randn(BATCH, 4, 8, 8)}
    return Case(DiffusionUNet(), batch, F.mse_loss)


class NoisingUNet(nn.Module):
    """Draws the timesteps' noise itself, mixes it in by a table of variances, and returns its own weighted loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DiffusionUNet()
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
        self.register_buffer("kept", kept)

    def forward(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> dict:
        """clean, noise: [batch, 4, h, w] -> {"loss": scalar, "predicted": as clean}."""
        kept = self.kept[t][:, None, None, None]
        predicted = self.net(kept.sqrt() * clean + (1 - kept).sqrt() * noise, t, context)
        weight = (kept / (1 - kept)).clamp(max=5.0)
        loss = (weight * (predicted - noise).square()).mean((1, 2, 3)).mean()
        return {"loss": loss, "predicted": predicted}


def ddpm() -> Case:
    """The whole training step of a diffusion model (min-SNR weights), own loss."""
    shape = (BATCH, 4, 8, 8)
    batch = {
        "clean": torch.randn(shape),
        "noise": torch.randn(shape),
        "t": torch.randint(0, 1000, (BATCH,)),
        "context": torch.randn(BATCH, 6, 16),
    }
    return Case(NoisingUNet(), batch)


class DiTBlock(nn.Module):
    """Transformer block whose norms have no weights: shift, scale and gate come from the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x: [batch, patches, width]; condition: [batch, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Diffusion transformer over 2 x 2 patches with class labels."""

    def __init__(self, width: int = 32, classes: int = 10, depth: int = 2) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Conv2d(4, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 16)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """noisy: [batch, 4, 8, 8]; t, y: [batch] int64 -> as noisy."""
        x = self.embed(noisy).flatten(2).mT + self.position
        condition = self.time(timestep_embedding(t, self.width).to(x.dtype)) + self.classes(y)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        return torch.einsum("bhwpqc->bchpwq", x.unflatten(1, (4, 4)).unflatten(-1, (2, 2, 4))).reshape(noisy.shape)


def dit() -> Case:
    """Diffusion transformer with modulated norms and class labels."""
    batch = _noisy() | {"y": torch.randint(0, 10, (BATCH,)), "target": torch.randn(BATCH, 4, 8, 8)}
    return Case(DiT(), batch, F.mse_loss)


ENTRIES = (
    *entries("diffusion", dit, transformers=True),
    *entries("diffusion", diffusion_unet, ddpm),
)
