"""Random numbers that do not depend on the plan: every number is a hash of where it stands.

The number of an element is a function of (seed, step, op, position of the element in the whole tensor). Replicas hence
draw alike, shards and microbatches draw their part of what one device would draw, a recomputation draws the same again,
and no generator has a state to keep. A rank computes only the numbers of its own part, whatever the split.

A position is (row, column): columns run over the last dims, rows over those before. A row has two keys of 32 bits, from
a 64-bit mix (Steele et al. 2014, "Fast splittable pseudorandom number generators") of the op's key and the row; a
number is a 32-bit multiply-xorshift mix of the column's Weyl sequence that takes in one key before the first round and
the other between the rounds. On a CPU that costs a third of what `torch.dropout` costs, which draws from a Mersenne
twister; on a GPU it moves about ten times the memory of the fused kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from shardplan.planner.placement import Mesh, local_slices, parse
from shardplan.rewrite.comm import Comm

_LEAST_COLUMNS = 256
_MOST_KEPT = 1 << 17
_GOLDEN = {32: 0x9E3779B9, 64: 0x9E3779B97F4A7C15}
_MIX_32 = (0x7FEB352D, 0x846CA68B)
_MIX_64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ALL_64 = 0xFFFF_FFFF_FFFF_FFFF


def mix(*parts: int) -> int:
    """A 64-bit hash of some integers, the same in every process and release."""
    state = 0
    for part in parts:
        state = (state + part + _GOLDEN[64]) & _ALL_64
        for shift, factor in zip((30, 27), _MIX_64, strict=True):
            state = ((state ^ (state >> shift)) * factor) & _ALL_64
        state ^= state >> 31
    return state


# -- positions ---------------------------------------------------------------------------------------------------------


Pieces = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class Positions:
    """Some elements of a whole tensor. shape: of the whole; pieces: by dim, (start, stop) ranges in order."""

    shape: tuple[int, ...]
    pieces: Pieces

    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in pieces) for pieces in self.pieces)

    def narrow(self, dim: int, start: int, stop: int) -> Positions:
        """Some of the entries of a dim, counted locally."""
        kept, offset = [], 0
        for low, high in self.pieces[dim]:
            left, right = max(start, offset), min(stop, offset + high - low)
            if left < right:
                kept.append((low + left - offset, low + right - offset))
            offset += high - low
        return Positions(self.shape, (*self.pieces[:dim], tuple(kept), *self.pieces[dim + 1 :]))


def where_text(shape: tuple[int, ...], placements: dict[str, str]) -> str:
    """Text that `positions` reads: a whole shape and how it lies on the mesh axes that split it, outer ones first.

    >>> where_text((8, 4, 64), {"dp": "S(0)", "tp": "S(2)"})
    '8x4x64 dp=S(0) tp=S(2)'
    """
    return " ".join(["x".join(map(str, shape)) or "scalar", *(f"{a}={p}" for a, p in placements.items())])


def positions(comm: Comm, where: str) -> Positions:
    """The elements that this rank has, in this microbatch, of a tensor that lies as `where_text` says."""
    shape, placements = _parse(where)
    return _local(shape, placements, tuple((comm.size(a), comm.index(a)) for a, _ in placements))


@lru_cache(maxsize=4096)
def _parse(where: str) -> tuple[tuple[int, ...], tuple[tuple[str, str], ...]]:
    size, *rest = where.split(" ")
    shape = () if size == "scalar" else tuple(map(int, size.split("x")))
    pairs = [text.partition("=") for text in rest]
    return shape, tuple((axis, placement) for axis, _, placement in pairs)


@lru_cache(maxsize=4096)
def _local(
    shape: tuple[int, ...], placements: tuple[tuple[str, str], ...], ranks: tuple[tuple[int, int], ...]
) -> Positions:
    axes = tuple(axis for axis, _ in placements)
    mesh = Mesh(axes, tuple(size for size, _ in ranks))
    layout = tuple(parse(text) for _, text in placements)
    coordinate = {axis: index for axis, (_, index) in zip(axes, ranks, strict=True)}
    return Positions(shape, tuple(tuple(pieces) for pieces in local_slices(shape, layout, mesh, coordinate)))


# -- numbers -----------------------------------------------------------------------------------------------------------


def bits(key: int, at: Positions, device: torch.device) -> torch.Tensor:
    """32 random bits for every position. -> int32 of the local shape, each value equally likely."""
    columns = len(at.shape)
    while columns and math.prod(at.shape[columns:]) < _LEAST_COLUMNS:
        columns -= 1
    keys = _keys(key, _scaled_index(at.shape[:columns], at.pieces[:columns], 64, device))
    found = keys[:, :1] + _scaled_index(at.shape[columns:], at.pieces[columns:], 32, device)
    _xor_high(found, 16, 32).mul_(_signed(_MIX_32[0], 32)).add_(keys[:, 1:])
    _xor_high(found, 15, 32).mul_(_signed(_MIX_32[1], 32))
    return _xor_high(found, 16, 32).view(at.local_shape())


def _xor_high(x: torch.Tensor, shift: int, width: int) -> torch.Tensor:
    """x ^= x >>> shift. Torch shifts signed integers arithmetically, so copies of the sign are masked off."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (width - shift)) - 1))


def _keys(key: int, rows: torch.Tensor) -> torch.Tensor:
    """rows: int64 [n], scaled -> int32 [n, 2]."""
    found = rows + _signed(key, 64)
    for shift, factor in zip((30, 27), _MIX_64, strict=True):
        _xor_high(found, shift, 64).mul_(_signed(factor, 64))
    return _xor_high(found, 31, 64).view(torch.int32).view(-1, 2)


def _scaled_index(shape: tuple[int, ...], pieces: Pieces, width: int, device: torch.device) -> torch.Tensor:
    """The elements' row-major index in the whole, times the golden ratio of 32 or 64 bits. -> int of that width [n]."""
    numel = math.prod(sum(stop - start for start, stop in of) for of in pieces)
    return (_kept_index if numel <= _MOST_KEPT else _make_index)(shape, pieces, width, device)


def _make_index(shape: tuple[int, ...], pieces: Pieces, width: int, device: torch.device) -> torch.Tensor:
    dtype = torch.int64 if width == 64 else torch.int32
    found = torch.zeros(1, dtype=dtype, device=device)
    for extent, ranges in zip(shape, pieces, strict=True):
        parts = [torch.arange(start, stop, dtype=dtype, device=device) for start, stop in ranges]
        along = torch.cat(parts) if parts else found.new_empty(0)
        found = (found.unsqueeze(-1) * extent + along).flatten()
    return found.mul_(_signed(_GOLDEN[width], width))


_kept_index = lru_cache(maxsize=64)(_make_index)


def _signed(value: int, width: int) -> int:
    """The two's complement integer of the same bits."""
    return value - (1 << width) if value >> (width - 1) else value


# -- distributions -----------------------------------------------------------------------------------------------------

# Bits of the fraction of a uniform number, so that rounding never gives 1.
_FRACTION_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(frozen=True, slots=True)
class Source:
    """Draws for one op. key: of (seed, step, op); at: the elements of the result that this rank has."""

    key: int
    at: Positions
    device: torch.device

    def bits(self, stream: int = 0) -> torch.Tensor:
        """int32; streams are independent of one another."""
        return bits(mix(self.key, stream), self.at, self.device)

    def chance(self, p: float, dtype: torch.dtype) -> torch.Tensor:
        """1 with probability p, else 0, in the dtype."""
        found = torch.empty(self.at.local_shape(), dtype=dtype, device=self.device)
        edge = round(p * 2**32) - 2**31
        if edge >= 2**31:
            return found.fill_(1)
        return torch.lt(self.bits(), edge, out=found)

    def uniform(self, dtype: torch.dtype, stream: int = 0) -> torch.Tensor:
        """[0, 1), every multiple of the dtype's resolution equally likely."""
        count = _FRACTION_BITS[dtype]
        if count <= 32:
            return ((self.bits(stream) >> (32 - count)) + (1 << (count - 1))).to(dtype).mul_(2.0**-count)
        return (self.wide(stream) >> (63 - count)).to(dtype).mul_(2.0**-count)

    def inside(self, dtype: torch.dtype, stream: int = 0) -> torch.Tensor:
        """(0, 1), both ends excluded and all of it exact. dtype: float32 or float64."""
        if dtype == torch.float64:
            return ((self.wide(stream) >> 11).to(dtype)).add_(0.5).mul_(2.0**-52)
        return ((self.bits(stream) >> 9) + (1 << 22)).to(dtype).add_(0.5).mul_(2.0**-23)

    def normal(self, dtype: torch.dtype, stream: int = 0) -> torch.Tensor:
        """Mean 0, variance 1 (Box and Muller 1958). dtype: float32 or float64."""
        radius = self.inside(dtype, stream).log_().mul_(-2).sqrt_()
        return radius.mul_(self.inside(dtype, stream + 1).mul_(2 * math.pi).cos_())

    def wide(self, stream: int = 0) -> torch.Tensor:
        """63 random bits. -> int64, not negative."""
        high = self.bits(stream).to(torch.int64).add_(2**31)
        low = self.bits(stream + 2).to(torch.int64).add_(2**31)
        return (high << 31) | (low >> 1)

    def below(self, low: int, high: int) -> torch.Tensor:
        """low .. high - 1, int64."""
        return (self.wide() % (high - low)).add_(low)


def source(comm: Comm, site: int, where: str, device: torch.device | str) -> Source:
    """Draws for random op number `site`, whose numbers lie as `where` says (see `where_text`)."""
    return Source(comm.key(site), positions(comm, where), torch.device(device))
