"""The notation of dimension rules, and strategies from it.

A rule is a line such as ``"... k, n k, n -> ... n"``: one term per tensor argument, then the results. A letter names a
dimension that can be split; ``_`` one that cannot; ``...`` stands for the leading dims of a term. Splitting a letter
shards every tensor that has it. A tensor argument without it is read whole by sharded compute, so its gradient is a
summand (``D``); a result without it is a summand (``P``), where the rule allows that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from shardplan.planner.placement import D, P, Placement, R, S
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, is_tensor, needs_grad, tensor_args

Term = list[str | None]


def parse_rule(rule: str, ranks: Sequence[int]) -> tuple[list[Term], list[Term]]:
    """Terms of arguments and results. ranks: dims of the tensor arguments, which fix what ``...`` stands for.

    Terms of arguments that the node does not have (an optional bias) are left out.
    """
    left, right = rule.split("->")
    width = 0
    texts = [part.split() for part in left.split(",")][: len(ranks)]
    for words, rank in zip(texts, ranks, strict=True):
        if "..." in words:
            width = max(width, rank - len(words) + 1)
    leading = [f"b{i}" for i in range(width)]

    def expand(words: list[str]) -> Term:
        term: Term = []
        for word in words:
            term += leading if word == "..." else [None if word == "_" else word]
        return term

    return [expand(words) for words in texts], [expand(part.split()) for part in right.split(",")]


def split_letters(
    node: fx.Node,
    inputs: Sequence[Term],
    outputs: Sequence[Term],
    *,
    partial: Collection[str] = (),
    scale: Collection[str] = (),
    skip: Collection[str] = (),
    impl: str | Mapping[str, str] | None = None,
    summand: int | None = None,
    groups: Mapping[str, int] | None = None,
) -> list[Strategy]:
    """One strategy per letter.

    partial: letters that may be missing from the results, which are then summands. scale: those of them over which the
    op takes a mean. skip: letters that only align dims. impl: name of the implementation, for all letters or by letter.
    summand: argument that is added to the result (a bias); it is a summand too where the result is one.
    groups: of a letter that consists of so many groups which stay together.
    """
    arguments, whole_state = tensor_args(node), read_whole(node)
    found = []
    for letter in dict.fromkeys(x for term in (*inputs, *outputs) for x in term if x is not None):
        if letter in skip:
            continue
        whole = not all(letter in term for term in outputs)
        if whole and letter not in partial:
            continue
        ins: list[Placement] = []
        for slot, (_, term) in enumerate(zip(arguments, inputs, strict=True)):
            if letter in term:
                ins.append(S(term.index(letter)))
            elif whole and slot == summand:
                ins.append(P)
            else:
                ins.append(whole_state[slot])
        outs = tuple(P if whole else S(term.index(letter)) for term in outputs)
        name = impl.get(letter) if isinstance(impl, Mapping) else impl
        found.append(Strategy(letter, tuple(ins), outs, name, letter in scale, (groups or {}).get(letter, 0)))
    return found


def read_whole(node: fx.Node) -> list[Placement]:
    """States of tensor arguments that split compute reads whole: their gradients, where there are any, are summands."""
    flows = needs_grad(node)
    return [D if flows and needs_grad(argument) else R for argument in tensor_args(node)]


def from_rule(node: fx.Node, rule: str, **options) -> list[Strategy]:
    """`split_letters` of a written rule."""
    inputs, outputs = parse_rule(rule, [len(info(a).shape) if is_tensor(a) else 0 for a in tensor_args(node)])
    return split_letters(node, inputs, outputs, **options)


def whole_strategies(node: fx.Node) -> list[Strategy]:
    """The two ways to run any op on all ranks alike: replicated, and its dual."""
    arguments, results = tensor_args(node), infos(node)
    found = [Strategy("-", (R,) * len(arguments), (R,) * len(results))]
    ins = tuple(read_whole(node))
    if D in ins:
        found.append(Strategy("d", ins, tuple(D if r.needs_grad else R for r in results)))
    return found


def linear_in(node: fx.Node, slots: Collection[int]) -> Strategy:
    """Summands pass through an op that is linear in these arguments taken together. The other operands of a product
    see only a summand of it, so their gradients are summands."""
    ins = tuple(P if slot in slots else state for slot, state in enumerate(read_whole(node)))
    return Strategy("p", ins, (P,) * len(infos(node)))


def broadcast_terms(shapes: Sequence[tuple[int, ...]], result: tuple[int, ...]) -> tuple[list[Term], Term]:
    """Terms of a broadcasting op: letters by position from the right; a dim of size 1 that is repeated has none."""
    rank = len(result)
    letters: Term = [f"b{i}" if extent > 1 else None for i, extent in enumerate(result)]
    terms: list[Term] = []
    for shape in shapes:
        offset = rank - len(shape)
        terms.append([letters[offset + i] if extent == result[offset + i] else None for i, extent in enumerate(shape)])
    return terms, letters
