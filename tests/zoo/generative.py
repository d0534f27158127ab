"""Generative models beyond diffusion: variational, adversarial, flows, energies. Noise is an input, so that one device
and a plan see the same."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case
from tests.zoo.registry import entries


class VAE(nn.Module):
    """Reparametrised Gaussian code; evidence lower bound summed over dims, averaged over samples."""

    def __init__(self, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32)
        )
        self.mean, self.log_variance = nn.Linear(32, code), nn.Linear(32, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, 128),
            nn.ReLU(),
            nn.Unflatten(1, (8, 4, 4)),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 1, 8, 8] in 0..1; noise: [batch, code] -> {"loss", "logits", "divergence"}."""
        h = F.relu(self.encoder(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        logits = self.decoder(mean + noise * torch.exp(0.5 * log_variance))
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        error = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
        return {"loss": (error + divergence).mean(), "logits": logits, "divergence": divergence}


def vae() -> Case:
    """Variational autoencoder, own loss."""
    return Case(VAE(), {"x": torch.rand(BATCH, 1, 8, 8), "noise": torch.randn(BATCH, 8)})


class GAN(nn.Module):
    """Both sides in one module: the discriminator's loss sees detached fakes, the generator's goes through a
    discriminator whose parameters are detached."""

    def __init__(self, code: int = 8) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(code, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def forward(self, real: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """real: [batch, 32]; noise: [batch, code] -> logits of real, of detached fakes, and of fakes."""
        fake = self.generator(noise)
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        judged = torch.func.functional_call(self.discriminator, fixed, fake)
        return self.discriminator(real), self.discriminator(fake.detach()), judged


def _adversarial(output: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
    real, fake, judged = (t.squeeze(-1) for t in output)
    return (
        F.binary_cross_entropy_with_logits(real, target)
        + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        + F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
    )


def gan() -> Case:
    """Generator and discriminator losses in one step (one-sided smoothing in the target)."""
    batch = {"real": torch.randn(BATCH, 32), "noise": torch.randn(BATCH, 8), "target": torch.full((BATCH,), 0.9)}
    return Case(GAN(), batch, _adversarial)


class WassersteinCritic(nn.Module):
    """A critic with the mean difference of scores, a hinge and a gradient penalty by finite differences."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Softplus(), nn.Linear(64, 1))

    def forward(self, real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """real, fake: [batch, 16]; mix: [batch, 1] in 0..1 -> scalar loss."""
        between = mix * real + (1 - mix) * fake
        away = F.normalize(real - fake, dim=-1)
        slope = (self.net(between + 1e-2 * away) - self.net(between - 1e-2 * away)) / 2e-2
        return self.net(fake).mean() - self.net(real).mean() + 10 * (slope.abs() - 1).square().mean()


def wasserstein_critic() -> Case:
    """Differences of means over the batch; own loss."""
    batch = {"real": torch.randn(BATCH, 16), "fake": torch.randn(BATCH, 16), "mix": torch.rand(BATCH, 1)}
    return Case(WassersteinCritic(), batch)


class Coupling(nn.Module):
    """Affine coupling: one half shifts and scales the other; returns the log determinant."""

    def __init__(self, width: int, swap: bool) -> None:
        super().__init__()
        self.swap = swap
        self.net = nn.Sequential(nn.Linear(width // 2, 32), nn.ReLU(), nn.Linear(32, width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, width] -> (the same shape, [batch])."""
        a, b = x.chunk(2, -1)
        if self.swap:
            a, b = b, a
        log_scale, shift = self.net(a).chunk(2, -1)
        log_scale = torch.tanh(log_scale)
        b = b * log_scale.exp() + shift
        return torch.cat([b, a] if self.swap else [a, b], -1), log_scale.sum(-1)


class Flow(nn.Module):
    """RealNVP with activation norms, invertible linear maps (log determinants) and permutations."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(width, bool(i % 2)) for i in range(depth))
        self.log_scale = nn.Parameter(torch.zeros(depth, width))
        self.mix = nn.ParameterList(
            nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width)) for _ in range(depth)
        )
        self.register_buffer("order", torch.arange(width).flip(0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, width] -> (code [batch, width], log determinant [batch])."""
        total = torch.zeros_like(x[:, 0])
        for index, layer in enumerate(self.layers):
            x = (x * self.log_scale[index].exp()) @ self.mix[index]
            total = total + self.log_scale[index].sum() + torch.linalg.slogdet(self.mix[index])[1]
            x, change = layer(x[:, self.order])
            total = total + change
        return x, total


def _flow_likelihood(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood under a unit Gaussian, samples weighted by target [batch]."""
    code, log_determinant = output
    each = 0.5 * code.square().sum(-1) + code.shape[-1] * 0.5 * math.log(2 * math.pi) - log_determinant
    return (each * target).sum() / target.sum()


def normalising_flow() -> Case:
    """Affine couplings, log determinants of linear maps, likelihood weighted per sample."""
    batch = {"x": torch.randn(BATCH, 8), "target": torch.rand(BATCH) + 0.5}
    return Case(Flow(), batch, _flow_likelihood)


class MaskedAutoregressive(nn.Module):
    """MADE: masks on the weights make output i depend on inputs before i."""

    def __init__(self, width: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, 2 * width)
        degrees = torch.arange(hidden) % (width - 1)
        self.register_buffer("mask1", (degrees[:, None] >= torch.arange(width)).float())
        self.register_buffer("mask2", (torch.arange(width)[:, None] > degrees).float().repeat(2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, width] -> negative log likelihood, a scalar."""
        h = F.relu(F.linear(x, self.first.weight * self.mask1, self.first.bias))
        mean, log_deviation = F.linear(h, self.second.weight * self.mask2, self.second.bias).chunk(2, -1)
        return F.gaussian_nll_loss(mean, x, torch.exp(2 * log_deviation), full=True)


def made() -> Case:
    """Masked weights; own loss."""
    return Case(MaskedAutoregressive(), {"x": torch.randn(BATCH, 8)})


class DeepSets(nn.Module):
    """Set transformer: induced points attend to the set, pooled by a learned seed; padded members are masked."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.induced, self.seed = nn.Parameter(torch.randn(1, 4, width)), nn.Parameter(torch.randn(1, 1, width))
        self.into, self.back, self.pool = (nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        """x: [batch, members, 4]; padded: [batch, members] bool -> [batch]."""
        h = self.embed(x)
        few = self.into(self.induced.expand(len(x), -1, -1), h, h, key_padding_mask=padded)[0]
        h = h + self.back(h, few, few)[0]
        pooled, weights = self.pool(self.seed.expand(len(x), -1, -1), h, h, key_padding_mask=padded)
        return self.head(pooled.squeeze(1)).squeeze(-1) + weights.amax(-1).squeeze(1)


def set_transformer() -> Case:
    """Induced points attend to padded sets, pooled by a learned seed."""
    padded = torch.arange(6) >= 6 - torch.arange(BATCH)[:, None] % 3
    batch = {"x": torch.randn(BATCH, 6, 4), "padded": padded, "target": torch.randn(BATCH)}
    return Case(DeepSets(), batch, F.huber_loss)


class DoubleQ(nn.Module):
    """Reinforcement learning: a network and its frozen copy, gathered action values, targets without gradient."""

    def __init__(self, actions: int = 4) -> None:
        super().__init__()

        def dueling() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "body": nn.Sequential(nn.Linear(16, 64), nn.ReLU()),
                    "value": nn.Linear(64, 1),
                    "advantage": nn.Linear(64, actions),
                }
            )

        self.online, self.frozen = dueling(), dueling().requires_grad_(False)

    def q(self, net: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        h = net["body"](x)
        advantage = net["advantage"](h)
        return net["value"](h) + advantage - advantage.mean(-1, keepdim=True)

    def forward(
        self, state: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, after: torch.Tensor, done: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """state, after: [batch, 16]; action, reward, done: [batch] -> {"loss", "error"}."""
        value = self.q(self.online, state).gather(1, action[:, None]).squeeze(1)
        with torch.no_grad():
            best = self.q(self.online, after).argmax(-1, keepdim=True)
            goal = reward + 0.9 * ~done * self.q(self.frozen, after).gather(1, best).squeeze(1)
        return {"loss": F.smooth_l1_loss(value, goal), "error": (value - goal).abs()}


def double_q() -> Case:
    """Temporal differences with a frozen copy under no_grad; own loss."""
    return Case(
        DoubleQ(),
        {
            "state": torch.randn(BATCH, 16),
            "action": torch.randint(0, 4, (BATCH,)),
            "reward": torch.randn(BATCH),
            "after": torch.randn(BATCH, 16),
            "done": torch.rand(BATCH) < 0.2,
        },
    )


ENTRIES = entries(
    "generative",
    vae,
    gan,
    wasserstein_critic,
    normalising_flow,
    made,
    set_transformer,
    double_q,
)
