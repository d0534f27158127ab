"""Ops whose backward is work for inputs and work for weights: what a schedule with backward in two parts can put off.

`rewrite.split_backward` splits these; the search prices them (`search.scheduling`).
"""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "bilinear", "einsum", "convolution"}
    | {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
"""Names in the namespace aten of ops whose gradients of inputs and of weights are work of their own."""


def is_product(node: fx.Node) -> bool:
    """Whether the node calls one of `PRODUCTS`."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    namespace, name = target._schema.name.split("::")
    return namespace == "aten" and name in PRODUCTS and not target._schema.is_mutable
