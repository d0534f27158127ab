"""Plain modules with the shapes that real code has: branches, sharing, ties, several outputs and losses, custom
functions, complex numbers, sorting, parameters that are frozen or unused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case
from tests.zoo.registry import entries

WIDTH, CLASSES = 32, 12


def _classified(model: nn.Module, *shape: int) -> Case:
    batch = {"x": torch.randn(BATCH, *shape or (16,)), "target": torch.randint(0, CLASSES, (BATCH,))}
    return Case(model, batch, F.cross_entropy)


class Branches(nn.Module):
    """An inception-like layer: branches of different depth, joined by concatenation, and a long skip by addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, WIDTH)
        self.one = nn.Linear(WIDTH, 16)
        self.two = nn.Sequential(nn.Linear(WIDTH, 64), nn.SELU(), nn.Linear(64, 8))
        self.three = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 64), nn.Mish(), nn.Linear(64, 8))
        self.gate = nn.Bilinear(16, WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 16] -> [batch, classes]."""
        h = F.softsign(self.stem(x))
        joined = torch.cat([self.one(h), self.two(h), self.three(h)], -1)
        return self.head(h + joined * torch.sigmoid(self.gate(x, h)))


def branches() -> Case:
    """Branches of different depth, a bilinear gate, a long skip."""
    return _classified(Branches())


class Siamese(nn.Module):
    """One network on two inputs, compared by a learned weighting of their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, WIDTH))
        self.weigh = nn.Linear(WIDTH, 1)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """left, right: [batch, 16] -> logits [batch]."""
        return self.weigh((self.net(left) - self.net(right)).abs()).squeeze(-1)


def siamese() -> Case:
    """Weights shared by two calls."""
    batch = {"left": torch.randn(BATCH, 16), "right": torch.randn(BATCH, 16)}
    return Case(
        Siamese(), batch | {"target": torch.randint(0, 2, (BATCH,)).float()}, F.binary_cross_entropy_with_logits
    )


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's matrices, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 64), nn.Linear(64, 8)
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(24))])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, 24] -> (reconstruction, code [batch, 8])."""
        code = self.second(F.relu(self.first(x)))
        h = F.relu(code @ self.second.weight + self.bias[0])
        return h @ self.first.weight + self.bias[1], code


def _sparse_reconstruction(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output[0], target) + 0.01 * output[1].abs().mean() + 1e-3 * output[1].norm(dim=-1).sum()


def tied_autoencoder() -> Case:
    """Encoder and decoder share matrices; a sparsity term in mean and a norm in sum."""
    x = torch.randn(BATCH, 24)
    return Case(TiedAutoencoder(), {"x": x, "target": x.clone()}, _sparse_reconstruction)


class MultiTask(nn.Module):
    """A trunk and three heads; the losses are weighed by learned uncertainties; outputs are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, WIDTH), nn.SiLU())
        self.classes, self.value, self.map = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 4 * 8)
        self.log_variance = nn.Parameter(torch.zeros(3))

    def forward(
        self, x: torch.Tensor, label: torch.Tensor, value: torch.Tensor, places: torch.Tensor
    ) -> dict[str, Any]:
        """x: [batch, 16]; label: [batch]; value: [batch]; places: [batch, 4] -> nested dict with "loss"."""
        h = self.trunk(x)
        logits, number, grid = self.classes(h), self.value(h).squeeze(-1), self.map(h).unflatten(-1, (4, 8))
        losses = torch.stack(
            [
                F.cross_entropy(logits, label, ignore_index=-100, label_smoothing=0.1),
                F.smooth_l1_loss(number, value),
                F.nll_loss(grid.log_softmax(-1).flatten(0, 1), places.flatten(), reduction="sum") / 100,
            ]
        )
        loss = (losses * torch.exp(-self.log_variance) + self.log_variance).sum()
        return {"loss": loss, "heads": {"logits": logits, "rest": (number, [grid, grid.argmax(-1)])}, "count": 3}


def multi_task() -> Case:
    """Three losses (mean with ignored labels, mean, sum), nested outputs."""
    label = torch.randint(0, CLASSES, (BATCH,))
    label[1::3] = -100
    batch = {"x": torch.randn(BATCH, 16), "label": label, "value": torch.randn(BATCH)}
    return Case(MultiTask(), batch | {"places": torch.randint(0, 8, (BATCH, 4))})


class Frozen(nn.Module):
    """A frozen body with trainable low-rank additions, a layer that is never called, and one used in some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)).requires_grad_(False)
        self.a = nn.ParameterList(nn.Parameter(torch.randn(4, WIDTH) / 6) for _ in range(3))
        self.b = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, 4) / 2) for _ in range(3))
        self.never = nn.Linear(WIDTH, WIDTH)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        """x: [batch, 32] -> [batch, classes]."""
        for layer, a, b in zip(self.body, self.a, self.b, strict=True):
            x = F.gelu(layer(x) + x @ a.T @ b.T)
        return self.head(self.sometimes(x) if extra else x)


def low_rank_adapters() -> Case:
    """Frozen body, trainable low-rank additions, unused parameters."""
    return _classified(Frozen(), WIDTH)


class RoundThrough(torch.autograd.Function):
    """Rounds forward, passes gradients backward where the input is in range."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bound: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return torch.clamp(torch.round(x), -bound, bound)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() <= ctx.bound), None


class QuantisedLinear(nn.Linear):
    """Weights and activations rounded to few levels, with a straight-through gradient and a learned scale."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, inner] -> [batch, outer]."""
        weight = RoundThrough.apply(self.weight / self.scale, 7.0) * self.scale
        return F.linear(RoundThrough.apply(x / 0.1, 15.0) * 0.1, weight, self.bias)


class Quantised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            QuantisedLinear(16, 64),
            nn.Hardswish(),
            QuantisedLinear(64, WIDTH),
            nn.Hardswish(),
            QuantisedLinear(WIDTH, CLASSES),
        )


def quantisation_aware() -> Case:
    """Custom autograd function with its own backward."""
    case = _classified(Quantised())
    case.batch["input"] = case.batch.pop("x")
    return case


class SortedPool(nn.Module):
    """Sorts, takes the largest, accumulates: what is read depends on the data, the shapes do not."""

    def __init__(self, kept: int = 4) -> None:
        super().__init__()
        self.kept = kept
        self.embed, self.score = nn.Linear(8, WIDTH), nn.Linear(8, 1)
        self.head = nn.Linear(3 * WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, tokens, 8] -> [batch, classes]."""
        h = F.relu(self.embed(x))
        best = self.score(x).squeeze(-1).topk(self.kept, -1)
        chosen = h.gather(1, best.indices[..., None].expand(-1, -1, WIDTH)) * best.values.sigmoid()[..., None]
        quantiles = h.sort(1).values[:, :: x.shape[1] // 4].mean(1)
        spread = h.cumsum(1).diff(dim=1).cummax(1).values.logsumexp(1)
        return self.head(torch.cat([chosen.sum(1), quantiles, spread], -1))


def sorted_pool() -> Case:
    """Sort, top-k, gather, cumulative sums and maxima."""
    return _classified(SortedPool(), 8, 8)


class SpectralConvolution(nn.Module):
    """Fourier neural operator: low frequencies multiplied by complex weights, the rest by a 1 x 1 convolution."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, 2) / width)
        self.local = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, width, h, w] -> the same shape."""
        modes = self.modes
        spectrum = torch.fft.rfft2(x)
        low = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :modes, :modes], torch.view_as_complex(self.weight))
        kept = torch.zeros_like(spectrum)
        kept[:, :, :modes, :modes] = low
        return F.gelu(torch.fft.irfft2(kept, s=x.shape[-2:]) + self.local(x))


class FourierOperator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.lift = nn.Linear(3, width)
        self.layers = nn.Sequential(*(SpectralConvolution(width, 3) for _ in range(2)))
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 8, 8] -> the same shape."""
        grid = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in x.shape[1:]), indexing="ij"), -1)
        grid = grid.to(x.dtype).expand(x.shape[0], -1, -1, -1)
        h = self.lift(torch.cat([x[..., None], grid], -1)).permute(0, 3, 1, 2)
        return self.head(self.layers(h).permute(0, 2, 3, 1)).squeeze(-1)


def _relative_l2(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over samples of the relative L2 error."""
    return ((output - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).mean()


def fourier_operator() -> Case:
    """FFT in two dims, complex weights, writes into a slice."""
    return Case(FourierOperator(), {"x": torch.randn(BATCH, 8, 8), "target": torch.randn(BATCH, 8, 8)}, _relative_l2)


class ContrastiveViews(nn.Module):
    """Two views of every sample, batch-normalised projections, softmax over all other views (SimCLR)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.project = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 16))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """first, second: [batch, 16] -> scalar loss."""
        z = F.normalize(self.project(self.encoder(torch.cat([first, second]))), dim=-1)
        n = len(first)
        similar = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
        return F.cross_entropy(similar, torch.arange(2 * n).roll(n))


def simclr() -> Case:
    """Contrastive loss over two views of the whole batch; own loss."""
    return Case(ContrastiveViews(), {"first": torch.randn(BATCH, 16), "second": torch.randn(BATCH, 16)})


class RedundancyReduction(nn.Module):
    """Barlow twins: the cross-correlation of features over the batch should be the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """first, second: [batch, 16] -> scalar loss."""
        a, b = self.net(first), self.net(second)
        a, b = ((t - t.mean(0)) / t.std(0) for t in (a, b))
        error = a.T @ b / len(a) - torch.eye(16, dtype=a.dtype)
        diagonal = torch.diagonal(error).square().sum()
        return diagonal + 0.005 * (error.square().sum() - diagonal)


def barlow_twins() -> Case:
    """Statistics over the batch; own loss."""
    return Case(RedundancyReduction(), {"first": torch.randn(BATCH, 16), "second": torch.randn(BATCH, 16)})


class Triplets(nn.Module):
    """Embeddings on the unit sphere by one network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ELU(), nn.Linear(64, WIDTH))

    def forward(self, anchor: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """anchor, near, far: [batch, 16] -> [3, batch, 32]."""
        return torch.stack([F.normalize(self.net(t), dim=-1) for t in (anchor, near, far)])


def _margin(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Triplet loss of embeddings [3, batch, width], beside a weighted cosine loss."""
    anchor, near, far = output.unbind(0)
    return F.triplet_margin_loss(anchor, near, far, margin=0.5) + 0.1 * F.cosine_embedding_loss(anchor, far, target)


def triplet() -> Case:
    """The batch is dim 1 of the output."""
    batch = {name: torch.randn(BATCH, 16) for name in ("anchor", "near", "far")}
    return Case(Triplets(), batch | {"target": torch.randint(0, 2, (BATCH,)) * 2.0 - 1}, _margin)


class HardTriplets(nn.Module):
    """Batch-hard mining: the farthest sample of the same class and the nearest of another, within the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.LeakyReLU(), nn.Linear(64, WIDTH))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 16]; label: [batch] int64 -> {"loss", "embeddings"}."""
        e = self.net(x)
        distance = (e[:, None] - e[None]).square().sum(-1).add(1e-8).sqrt()
        same = label[:, None] == label[None]
        far = distance.masked_fill(~same, -1.0).amax(1)
        near = distance.masked_fill(same, 1e4).amin(1)
        return {"loss": F.softplus(far - near).mean(), "embeddings": e}


def hard_triplets() -> Case:
    """Mining within the batch; own loss."""
    return Case(HardTriplets(), {"x": torch.randn(BATCH, 16), "label": torch.arange(BATCH) % 3})


class MixtureDensity(nn.Module):
    """Weights, means and deviations of a mixture of Gaussians."""

    def __init__(self, parts: int = 4, outputs: int = 2) -> None:
        super().__init__()
        self.parts, self.outputs = parts, outputs
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, parts * (1 + 2 * outputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: [batch, 16] -> log weights [batch, parts], means and log deviations [batch, parts, outputs]."""
        n = self.parts * self.outputs
        weights, mean, deviation = self.head(self.body(x)).split([self.parts, n, n], -1)
        return weights.log_softmax(-1), *(t.unflatten(-1, (self.parts, -1)) for t in (mean, deviation))


def _mixture_likelihood(output: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
    weights, mean, deviation = output
    normal = torch.distributions.Normal(mean, deviation.exp(), validate_args=False)
    return -torch.logsumexp(weights + normal.log_prob(target[:, None]).sum(-1), -1).mean()


def mixture_density() -> Case:
    """`torch.distributions` in the loss."""
    batch = {"x": torch.randn(BATCH, 16), "target": torch.randn(BATCH, 2)}
    return Case(MixtureDensity(), batch, _mixture_likelihood)


class HyperNetwork(nn.Module):
    """A condition makes the weights of a small network, one per sample; `vmap` over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16 * 8 + 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x: [batch, 16]; condition: [batch, 8] -> [batch, classes]."""

        def one(sample: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            return torch.sin(sample @ made[: 16 * 8].view(16, 8) + made[16 * 8 :])

        return self.head(torch.func.vmap(one)(x, self.make(condition)))


def hyper_network() -> Case:
    """Weights made per sample, used under `vmap`."""
    case = _classified(HyperNetwork())
    case.batch["condition"] = torch.randn(BATCH, 8)
    return case


class ConvexLayer(nn.Module):
    """A fixed-point layer (deep equilibrium, unrolled), spectral normalisation, and a ridge regression head solved in
    closed form on features of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, WIDTH)
        self.again = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.log_ridge = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 16]; y: [batch, 2] -> {"loss", "predicted"}."""
        driven = self.inner(x)
        z = torch.zeros_like(driven)
        for _ in range(3):
            z = torch.tanh(0.5 * self.again(z) + driven)
        gram = z @ z.T + self.log_ridge.exp() * torch.eye(len(z), dtype=z.dtype)
        alpha = torch.linalg.solve(gram, y)
        predicted = y - self.log_ridge.exp() * alpha
        residual = alpha / torch.linalg.inv(gram).diagonal()[:, None]  # leave-one-out errors
        return {"loss": residual.square().mean(), "predicted": predicted}


def ridge_equilibrium() -> Case:
    """Unrolled fixed point, weight norm, a linear system over the batch; own loss."""
    return Case(ConvexLayer(), {"x": torch.randn(BATCH, 16), "y": torch.randn(BATCH, 2)})


class NeuralField(nn.Module):
    """Radiance field: positions encoded by octaves, an mlp with a skip, colours composed along rays by a cumulative
    product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(27, 64)
        self.second = nn.Linear(64 + 27, 64)
        self.density, self.colour = nn.Linear(64, 1), nn.Linear(64 + 3, 3)

    def forward(self, origin: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """origin, direction: [batch, 3] -> colours [batch, 3]."""
        depth = torch.linspace(0.5, 2.0, 8, dtype=origin.dtype)
        points = origin[:, None] + depth[:, None] * direction[:, None]
        waves = points[..., None] * 2.0 ** torch.arange(4, dtype=origin.dtype)
        encoded = torch.cat([points, waves.sin().flatten(-2), waves.cos().flatten(-2)], -1)
        h = F.relu(self.second(torch.cat([F.relu(self.first(encoded)), encoded], -1)))
        density = F.softplus(self.density(h)).squeeze(-1)
        colour = torch.sigmoid(self.colour(torch.cat([h, direction[:, None].expand_as(points)], -1)))
        kept = torch.exp(-density * (depth[1] - depth[0]))
        reached = torch.cat([torch.ones_like(kept[:, :1]), kept[:, :-1]], 1).cumprod(1)
        return ((reached * (1 - kept))[..., None] * colour).sum(1)


def radiance_field() -> Case:
    """Positions encoded by octaves, colours composed along rays by a cumulative product."""
    batch = {"origin": torch.randn(BATCH, 3), "direction": F.normalize(torch.randn(BATCH, 3), dim=-1)}
    return Case(NeuralField(), batch | {"target": torch.rand(BATCH, 3)}, F.mse_loss)


class CodeBook(nn.Module):
    """Vector quantisation: nearest code by distance, straight-through gradient, commitment and codebook losses."""

    def __init__(self, codes: int = 16, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, width, 1))
        self.codes = nn.Embedding(codes, width)
        self.decoder = nn.Sequential(nn.Conv1d(width, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 4, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 4, time] -> {"loss", "decoded", "codes", "perplexity"}."""
        z = self.encoder(x).mT
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ self.codes.weight.T + self.codes.weight.square().sum(-1)
        index = distance.argmin(-1)
        q = self.codes(index)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        decoded = self.decoder((z + (q - z).detach()).mT)
        used = F.one_hot(index, self.codes.num_embeddings).to(x.dtype).mean((0, 1))
        perplexity = torch.exp(-(used * (used + 1e-10).log()).sum())
        return {"loss": loss + F.mse_loss(decoded, x), "decoded": decoded, "codes": index, "perplexity": perplexity}


def vector_quantised() -> Case:
    """Nearest codes, straight-through gradients, a batch statistic among the outputs; own loss."""
    return Case(CodeBook(), {"x": torch.randn(BATCH, 4, 8)})


ENTRIES = entries(
    "plain",
    branches,
    siamese,
    tied_autoencoder,
    multi_task,
    low_rank_adapters,
    quantisation_aware,
    sorted_pool,
    fourier_operator,
    simclr,
    barlow_twins,
    triplet,
    hard_triplets,
    mixture_density,
    hyper_network,
    ridge_equilibrium,
    radiance_field,
    vector_quantised,
)
