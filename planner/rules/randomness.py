"""Which ops draw random numbers.

Such an op always runs by an implementation of `rewrite.random_ops`, whose numbers follow from where they stand:
replicas draw the same, shards and microbatches their part of what one device draws, and a recomputation the same again.
"""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.rules.schema import argument

aten = torch.ops.aten

_DROPOUTS = frozenset(
    {
        aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default, aten.native_dropout.default,
    }
)  # fmt: skip
_RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})


def draws(node: fx.Node) -> bool:
    """Whether the op draws random numbers as it is called here (dropout with p = 0 does not)."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if node.target in _DROPOUTS:
        return float(argument(node, "p") or 0.0) > 0.0 and bool(argument(node, "train"))
    if node.target is aten.scaled_dot_product_attention.default:
        return float(argument(node, "dropout_p") or 0.0) > 0.0
    if node.target in _RECURRENT:
        return float(argument(node, "dropout") or 0.0) > 0.0 and bool(argument(node, "train"))
    if node.target is aten.rrelu.default:
        return bool(argument(node, "training"))
    return True


def random_impl(node: fx.Node) -> str | None:
    """Name of the implementation of an op that draws, or None where it draws nothing."""
    return "random" if draws(node) else None
