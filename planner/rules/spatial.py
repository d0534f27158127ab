"""Pooling, resampling and padding: samples and channels are independent."""

from __future__ import annotations

import re

import torch
from torch import fx

from shardplan.planner.rules import views
from shardplan.planner.rules.letters import Term, linear_in, split_letters
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import infos, tensor_args

aten = torch.ops.aten


def windows(node: fx.Node) -> list[Strategy]:
    """Pooling, upsampling: the trailing one, two or three dims stay whole."""
    found = re.search(r"([123])d", node.target._opname)  # type: ignore[union-attr]
    window = int(found[1]) if found else 2
    term: Term = [*(f"b{i}" for i in range(len(shapes(node)[0]) - window)), *[None] * window]
    return split_letters(node, [term], [term] * len(infos(node)))


def shuffle(node: fx.Node) -> list[Strategy]:
    """pixel_shuffle, pixel_unshuffle: channels and positions are mixed."""
    rank = len(shapes(node)[0])
    term: Term = [*(f"b{i}" for i in range(rank - 3)), None, None, None]
    return split_letters(node, [term], [term])


def im2col(node: fx.Node) -> list[Strategy]:
    """[n, c, h, w] -> [n, (c window), positions]: channels are the outer factor."""
    if len(shapes(node)[0]) != 4:
        return []
    return split_letters(node, [["b0", "b1", None, None]], [["b0", "b1", None]])


def grid_sample(node: fx.Node) -> list[Strategy]:
    spatial: Term = [None] * (len(shapes(node)[0]) - 2)
    return split_letters(node, [["n", "c", *spatial], ["n", *spatial, None]], [["n", "c", *spatial]])


def affine_grid(node: fx.Node) -> list[Strategy]:
    """theta [n, 2, 3] -> grid [n, h, w, 2] (and one dim more); the size argument has n as well."""
    positions: Term = [None] * len(infos(node)[0].shape[1:])
    found = split_letters(node, [["n", None, None]], [["n", *positions]])
    return [*found, linear_in(node, (0,))]


def pad(node: fx.Node) -> list[Strategy]:
    """Dims that are padded stay whole; padding with zeros or with values of the tensor lets summands pass."""
    pads = list(argument(node, "pad"))
    rank = len(shapes(node)[0])
    padded = [rank - 1 - i // 2 for i in range(len(pads)) if pads[i]]
    constant = argument(node, "mode", "constant") == "constant"
    linear = not constant or not argument(node, "value")
    return views.other_dims(node, padded, linear=linear and len(tensor_args(node)) == 1)
