"""Ops that draw random numbers, as a rank runs them: every number is a hash of where it stands (`rewrite.draws`).

`site` is the op's place in the trace, `where` how its numbers lie (`draws.where_text`). Factories are called with the
dtype and the device of their result, the others with the op's arguments.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shardplan.rewrite.comm import Comm
from shardplan.rewrite.draws import Source, source

aten = torch.ops.aten
_SELU = 1.7580993408473766
_MOST_SCORES = 1 << 27
_COMPLEX = (0, 4)  # streams of the real and the imaginary part
_DRAWING = threading.Lock()
Number = float | torch.Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute a distribution in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


# -- numbers -----------------------------------------------------------------------------------------------------------


def uniform(
    comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """rand, uniform."""
    found = source(comm, site, where, device)
    if dtype.is_complex:
        return torch.complex(*(found.uniform(_wide(dtype), stream) for stream in _COMPLEX)).to(dtype)
    drawn = found.uniform(dtype)
    return drawn if (low, high) == (0.0, 1.0) else drawn.mul_(high - low).add_(low)


def normal(
    comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, mean: Number = 0.0, std: Number = 1.0
) -> torch.Tensor:
    """randn, normal; mean and std may be tensors that broadcast to the result."""
    found = source(comm, site, where, device)
    if dtype.is_complex:  # of variance 1 in all
        parts = (found.normal(_wide(dtype), stream).mul_(math.sqrt(0.5)) for stream in _COMPLEX)
        return torch.complex(*parts).to(dtype)
    drawn = found.normal(_wide(dtype))
    if isinstance(mean, torch.Tensor) or isinstance(std, torch.Tensor) or (mean, std) != (0.0, 1.0):
        with torch.no_grad():
            drawn = drawn * std + mean
    return drawn.to(dtype)


def log_normal(
    comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, mean: float = 1.0, std: float = 2.0
) -> torch.Tensor:
    return normal(comm, site, where, _wide(dtype), device, mean, std).exp_().to(dtype)


def exponential(
    comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, rate: float = 1.0
) -> torch.Tensor:
    """Positive, so that its logarithm is finite."""
    return source(comm, site, where, device).inside(_wide(dtype)).log_().div_(-rate).to(dtype)


def cauchy(
    comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, median: float = 0.0, sigma: float = 1.0
) -> torch.Tensor:
    drawn = source(comm, site, where, device).inside(_wide(dtype))
    return drawn.sub_(0.5).mul_(math.pi).tan_().mul_(sigma).add_(median).to(dtype)


def geometric(comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, p: float) -> torch.Tensor:
    """Trials up to the first success, from 1."""
    drawn = source(comm, site, where, device).inside(torch.float64)
    return drawn.log_().div_(math.log1p(-p) if p < 1 else -math.inf).ceil_().clamp_(min=1).to(dtype)


def integers(
    comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, low: int, high: int
) -> torch.Tensor:
    """randint: low .. high - 1."""
    return source(comm, site, where, device).below(low, high).to(dtype)


def bernoulli(comm: Comm, site: int, where: str, dtype: torch.dtype, device: torch.device, p: Number) -> torch.Tensor:
    """1 with probability p, a number or a tensor of the result's shape."""
    found = source(comm, site, where, device)
    if not isinstance(p, torch.Tensor):
        return found.chance(p, dtype)
    return (found.inside(_wide(p.dtype)) < p.detach()).to(dtype)


def multinomial(comm: Comm, site: int, where: str, x: torch.Tensor, count: int, replacement: bool) -> torch.Tensor:
    """x: weights [..., n] -> int64 [..., count]. where: of [..., count] with replacement, else of [..., n].

    With replacement by inversion; without, the `count` largest of weight / exponential (Efraimidis, Spirakis 2006).
    """
    drawn = source(comm, site, where, x.device).inside(torch.float64)
    x = x.double()
    if not replacement:
        return (x / drawn.log_().neg_()).topk(count, -1).indices
    steps = x.cumsum(-1)
    found = torch.searchsorted(steps, drawn.mul_(steps[..., -1:]), right=True)
    return found.clamp_(max=x.shape[-1] - 1)


# -- dropouts ----------------------------------------------------------------------------------------------------------


def _noise(draws: Source, p: float, dtype: torch.dtype) -> torch.Tensor:
    """0 with probability p, else 1 / (1 - p)."""
    kept = draws.chance(1 - p, dtype)
    return kept.mul_(1 / (1 - p)) if p < 1 else kept


def dropout(comm: Comm, site: int, where: str, x: torch.Tensor, p: float) -> torch.Tensor:
    """Elementwise, or of whole features where `where` has extents of 1."""
    return x * _noise(source(comm, site, where, x.device), p, x.dtype)


def native_dropout(comm: Comm, site: int, where: str, x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (dropped out, mask bool)."""
    noise = _noise(source(comm, site, where, x.device), p, x.dtype)
    return x * noise, noise != 0


def alpha_dropout(comm: Comm, site: int, where: str, x: torch.Tensor, p: float) -> torch.Tensor:
    """Klambauer et al. 2017, section 3: dropped values become those of a saturated SELU, mean and variance are kept."""
    if p >= 1:
        return x * 0
    kept = source(comm, site, where, x.device).chance(1 - p, x.dtype)
    scale = 1 / math.sqrt((_SELU**2 * p + 1) * (1 - p))
    shift = (kept - 1).mul_(_SELU * scale).add_(_SELU * scale * p)
    return x * kept.mul_(scale) + shift


def rrelu(comm: Comm, site: int, where: str, x: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    """Negative values are multiplied by a uniform number."""
    slope = source(comm, site, where, x.device).uniform(_wide(x.dtype)).mul_(upper - lower).add_(lower).to(x.dtype)
    return torch.where(x <= 0, x * slope, x)


# -- composite ops -----------------------------------------------------------------------------------------------------


def attention(
    comm: Comm,
    site: int,
    where: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention whose weights are dropped out. query: [..., heads, q, d] -> [..., heads, q, e]; where: of the weights
    [..., heads, q, k].

    Fused kernels draw by their own tiles, so the weights are computed here: all of them, or, where they are many, some
    rows at a time, which the backward computes again.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    rows = query.shape[-2]
    draws = source(comm, site, where, query.device)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def some(start: int, stop: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = attn_mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] == rows > 1:
            mask = mask[..., start:stop, :]
        if is_causal:
            ahead = torch.ones(stop - start, key.shape[-2], dtype=torch.bool, device=query.device).triu_(start + 1)
            mask = ~ahead
        part = Source(draws.key, draws.at.narrow(len(draws.at.shape) - 2, start, stop), draws.device)
        return _weighted(part, query[..., start:stop, :], key, value, mask, dropout_p, factor)

    step = max(_MOST_SCORES // max(math.prod(query.shape[:-2]) * key.shape[-2], 1), 1)
    if step >= rows:
        return some(0, rows, query, key, value)
    return torch.cat(
        [
            checkpoint(
                some, start, min(start + step, rows), query, key, value,
                use_reentrant=False, preserve_rng_state=False,
            )
            for start in range(0, rows, step)
        ],
        -2,
    )  # fmt: skip


def _weighted(
    draws: Source,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    factor: float,
) -> torch.Tensor:
    """Softmax in at least fp32; products too on a CPU, as torch has it there."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float64:
        query, key, value = query.float(), key.float(), value.float()
    scores = (query * factor) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = aten._safe_softmax.default(scores, -1, _wide(scores.dtype)).to(value.dtype)
    return ((weights * _noise(draws, p, weights.dtype)) @ value).to(dtype)


def recurrent(
    comm: Comm,
    site: int,
    where: str,
    op: Callable[..., Any],
    x: torch.Tensor,
    state: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    has_biases: bool,
    layers: int,
    p: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """lstm, gru, rnn with dropout between the layers, which run one by one. where: of a layer's output."""
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // layers
    ends: list[list[torch.Tensor]] = []
    for layer in range(layers):
        if layer:
            x = dropout_stream(comm, site, where, x, p, layer)
        mine = [s[layer * directions : (layer + 1) * directions] for s in states]
        given = mine if isinstance(state, (tuple, list)) else mine[0]
        own = list(weights[layer * per_layer : (layer + 1) * per_layer])
        x, *end = op(x, given, own, has_biases, 1, 0.0, train, bidirectional, batch_first)
        ends.append(end)
    return (x, *(torch.cat(parts) for parts in zip(*ends, strict=True)))


def dropout_stream(comm: Comm, site: int, where: str, x: torch.Tensor, p: float, stream: int) -> torch.Tensor:
    """One of several dropouts of an op."""
    draws = source(comm, site, where, x.device)
    return x * _noise(Source(draws.key + stream, draws.at, draws.device), p, x.dtype)


# -- anything else -----------------------------------------------------------------------------------------------------


@contextmanager
def seeded(comm: Comm, site: int, device: torch.device) -> Iterator[None]:
    """The device's generator starts from the key of the site and goes on afterwards as if nothing had been drawn."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    else:
        generator = torch.default_generator
    with _DRAWING:  # ranks may be threads
        state = generator.get_state()
        generator.manual_seed(comm.key(site))
        try:
            yield
        finally:
            generator.set_state(state)


def replicated(comm: Comm, site: int, device: torch.device, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An op whose numbers nobody splits (randperm, poisson): it runs whole on every rank, from the same seed."""
    with seeded(comm, site, torch.device(device)):
        return op(*args, **kwargs)
