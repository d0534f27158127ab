"""Recurrence and scans: fused recurrent ops, hand-written cells, and state-space models."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case, ragged_labels, token_loss, tokens
from tests.zoo.registry import entries

WORDS, LENGTH = 96, 12


class Recurrent(nn.Module):
    """Embedding, a recurrent network, logits per token."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.core = core
        self.head = nn.Linear(width, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] int64 -> logits [batch, seq, words]."""
        return self.head(self.core(self.embed(ids))[0])


def _language(model: nn.Module) -> Case:
    ids = tokens(WORDS, BATCH, LENGTH)
    return Case(model, {"ids": ids, "target": ragged_labels(ids)}, token_loss)


def lstm() -> Case:
    """Two layers, both directions."""
    return _language(Recurrent(nn.LSTM(32, 16, 2, batch_first=True, bidirectional=True), 32))


def gru() -> Case:
    """Two layers of gated recurrent units."""
    return _language(Recurrent(nn.GRU(32, 32, 2, batch_first=True), 32))


class CellLoop(nn.Module):
    """`nn.LSTMCell` and `nn.GRUCell` called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(32, 32), nn.GRUCell(32, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """x: [batch, seq, 32] -> ([batch, seq, 32],)."""
        h = c = g = x.new_zeros(x.shape[0], 32)
        found = []
        for step in x.unbind(1):
            h, c = self.first(step, (h, c))
            g = self.second(h, g)
            found.append(g)
        return (torch.stack(found, 1),)


def rnn_cells() -> Case:
    """LSTM and GRU cells called in a loop over time."""
    return _language(Recurrent(CellLoop(), 32))


class PlainRNN(nn.Module):
    """An Elman network written out: one matrix for input and state, a buffer indexed by time filled in a loop."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner, self.hidden = nn.Linear(32, width), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """x: [batch, seq, 32] -> ([batch, seq, width],)."""
        out = torch.zeros_like(x)
        state = torch.zeros_like(x[:, 0])
        driven = self.inner(x)
        for step in range(x.shape[1]):
            state = torch.tanh(driven[:, step] + self.hidden(state))
            out[:, step] = state
        return (out,)


def elman() -> Case:
    """Written out, results stored in place."""
    return _language(Recurrent(PlainRNN(), 32))


class Seq2Seq(nn.Module):
    """Encoder and decoder GRUs, additive attention over the encoder's states at every step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.cell = nn.GRUCell(2 * width, width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.head = nn.Linear(2 * width, WORDS)

    def forward(self, source: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """source: [batch, long], ids: [batch, seq] int64 (0 is padding) -> logits [batch, seq, words]."""
        states, last = self.encoder(self.embed(source))
        keys, state = self.key(states), last[0]
        padded = source == 0
        found = []
        for step in self.embed(ids).unbind(1):
            scores = self.score(torch.tanh(keys + self.query(state)[:, None])).squeeze(-1)
            weights = scores.masked_fill(padded, float("-inf")).softmax(-1)
            context = torch.bmm(weights[:, None], states).squeeze(1)
            state = self.cell(torch.cat([step, context], -1), state)
            found.append(self.head(torch.cat([state, context], -1)))
        return torch.stack(found, 1)


def seq2seq_attention() -> Case:
    """Recurrent encoder and decoder with additive attention, padding masked."""
    source = tokens(WORDS, BATCH, LENGTH)
    source[::2, -3:] = 0
    ids = tokens(WORDS, BATCH, 6)
    return Case(Seq2Seq(), {"source": source, "ids": ids, "target": ragged_labels(ids)}, token_loss)


# -- state space -------------------------------------------------------------------------------------------------------


class S4D(nn.Module):
    """Diagonal state space as a long convolution by FFT; the kernel is a complex Vandermonde product."""

    def __init__(self, width: int = 32, states: int = 8) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(width) * 2 - 4)
        self.log_real = nn.Parameter(torch.log(0.5 * torch.ones(width, states)))
        self.imaginary = nn.Parameter(math.pi * torch.arange(states).repeat(width, 1).float())
        self.c = nn.Parameter(torch.randn(width, states, 2) / states)
        self.skip = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, width] -> the same shape."""
        length = x.shape[1]
        step = self.log_step.exp()[:, None]
        a = torch.complex(-self.log_real.exp(), self.imaginary)
        rotated = a * step
        time = torch.arange(length, device=x.device)
        c = torch.view_as_complex(self.c) * (torch.exp(rotated) - 1) / a
        kernel = 2 * torch.einsum("hn,hnl->hl", c, torch.exp(rotated[..., None] * time)).real
        u = x.mT
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length)
        y = y[..., :length] + u * self.skip[:, None]
        return F.glu(self.out(F.gelu(y.mT)), -1)


class Residual(nn.Module):
    """Pre-norm residual layers around token embeddings."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in layers)
        self.head = nn.Linear(32, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] int64 -> logits [batch, seq, words]."""
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def s4d() -> Case:
    """Diagonal state space as a long convolution by FFT, complex kernel."""
    return _language(Residual([S4D(), S4D()]))


class SelectiveScan(nn.Module):
    """Mamba's block written out: causal depthwise convolution, input-dependent steps, a gated output.

    cumulative: the scan as a ratio of cumulative products instead of a loop over time.
    """

    def __init__(self, width: int = 32, inner: int = 32, states: int = 4, cumulative: bool = False) -> None:
        super().__init__()
        self.inner, self.states, self.cumulative = inner, states, cumulative
        self.project = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.select = nn.Linear(inner, 2 * states + 2, bias=False)
        self.step = nn.Linear(2, inner)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, states + 1).float()).repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, width] -> the same shape."""
        value, gate = self.project(x).chunk(2, -1)
        value = F.silu(self.conv(value.mT)[..., : x.shape[1]]).mT
        low, b, c = self.select(value).split([2, self.states, self.states], -1)
        step = F.softplus(self.step(low))
        decay = step[..., None] * -self.log_a.exp()
        driven = step[..., None] * b[:, :, None] * value[..., None]
        y = (self.sums(decay, driven) if self.cumulative else self.loop(decay, driven)) * c[:, :, None]
        return self.out((y.sum(-1) + value * self.skip) * F.silu(gate))

    def loop(self, decay: torch.Tensor, driven: torch.Tensor) -> torch.Tensor:
        """decay, driven: [batch, seq, inner, states] -> states after every step."""
        state = torch.zeros_like(driven[:, 0])
        found = []
        for t in range(driven.shape[1]):
            state = decay[:, t].exp() * state + driven[:, t]
            found.append(state)
        return torch.stack(found, 1)

    def sums(self, decay: torch.Tensor, driven: torch.Tensor) -> torch.Tensor:
        logs = decay.cumsum(1)
        return logs.exp() * (driven * (-logs).exp()).cumsum(1)


def mamba_loop() -> Case:
    """Selective scan as a loop over time."""
    return _language(Residual([SelectiveScan(), SelectiveScan()]))


def mamba_cumsum() -> Case:
    """Selective scan by cumulative sums."""
    return _language(Residual([SelectiveScan(cumulative=True), SelectiveScan(cumulative=True)]))


class LinearAttention(nn.Module):
    """Causal linear attention: cumulative sums of outer products, per head."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, width] -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("bshd,bshe->bshde", k, v).cumsum(1)
        weight = torch.einsum("bshd,bshd->bsh", q, k.cumsum(1))
        return self.out((torch.einsum("bshd,bshde->bshe", q, memory) / weight[..., None]).flatten(2))


def linear_attention() -> Case:
    """Causal linear attention by cumulative sums of outer products."""
    return _language(Residual([LinearAttention(), LinearAttention()]))


ENTRIES = entries(
    "recurrent",
    lstm,
    gru,
    rnn_cells,
    elman,
    seq2seq_attention,
    s4d,
    mamba_loop,
    mamba_cumsum,
    linear_attention,
)
