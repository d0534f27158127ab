"""Rules that users write for operators of their own, one line each."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.errors import UsageError
from shardplan.planner.rules import families
from shardplan.planner.rules.letters import from_rule, parse_rule
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, is_tensor, tensor_args


def rule(op: Any, text: str, sums: str = "") -> None:
    """Say how an operator of yours may be split, for the plans to come.

    op: ``"library::name"``, or what ``torch.library.custom_op`` returned. text: a term per tensor argument, then the
    results: ``"b n, n -> b n"``. A letter names a dimension that can be split (every tensor with that letter is split
    there), ``_`` one that cannot, ``...`` the leading dims. sums: letters missing from the results over which the op
    adds up, so that splitting them leaves summands. The rule is not proven: an operator whose rule is wrong computes
    something else when it is split, which `shardplan check` finds.

    Raises UsageError on an operator that is not registered, on a rule that cannot be read and, when a model is planned,
    on one that does not fit the operator's tensors.
    """
    target = _overload(op)
    letters = sums.split()
    words = set(text.replace("->", " ").replace(",", " ").split())
    if text.count("->") != 1 or not set(letters) <= words:
        raise UsageError(
            f"cannot read the rule {text!r} with sums {sums!r}",
            hints=['a term per tensor argument, then the results: rule("mylib::scale", "b n, n -> b n")'],
        )

    def own(node: fx.Node) -> list[Strategy]:
        _check(node, text)
        return from_rule(node, text, partial=letters)

    families.RULES[target] = own


def _overload(op: Any) -> Any:
    if isinstance(op, str):
        library, colons, name = op.partition("::")
        packet = getattr(getattr(torch.ops, library, None), name, None) if colons else None
    else:
        packet = getattr(op, "_opoverload", op)
    found = getattr(packet, "default", packet)
    if not isinstance(found, torch._ops.OpOverload):
        raise UsageError(
            f"there is no operator {op!r}", hints=['register it first: @torch.library.custom_op("mylib::scale", ...)']
        )
    return found


def _check(node: fx.Node, text: str) -> None:
    ranks = [len(info(a).shape) if is_tensor(a) else 0 for a in tensor_args(node)]
    try:
        terms, results = parse_rule(text, ranks)
    except ValueError:
        terms, results = [], []
    outs = [len(result.shape) for result in infos(node)]
    if [len(term) for term in terms] != ranks or [len(term) for term in results] != outs:
        raise UsageError(
            f"the rule {text!r} does not fit {node.target}",
            [f"it takes tensors of {ranks} dims and gives tensors of {outs}"],
        )
