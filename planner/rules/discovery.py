"""Rules for ops that have no written one: found by running the op on shards, and kept.

Used in one place, `planner.rules.strategies`. An op is tried once for every pattern of sizes; what came out stays in
memory, and for the ops that torch ships also on disk, next to the measurements. The implementation of a custom op may
change from run to run without anything telling, so what was found for one does not outlive the process.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx

from shardplan.planner.rules.draws import VARIANTS, scalings
from shardplan.planner.rules.laboratory import Laboratory
from shardplan.planner.rules.question import Question, ask
from shardplan.planner.rules.randomness import draws
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.rules.trial import Answer
from shardplan.planner.trace import info, infos, mutated, tensor_args

log = logging.getLogger(__name__)

_METHOD = 4
"""Of how rules are found; an answer of another method is not read."""
_SHIPPED = frozenset({"aten", "prims"})
_UNTRIED = tuple(
    getattr(torch.Tag, name)
    for name in ("data_dependent_output", "dynamic_output_shape", "nondeterministic_seeded")
    if hasattr(torch.Tag, name)
)

_answers: dict[str, Answer] = {}
_lock = threading.Lock()
_laboratory = Laboratory()


def discovered(node: fx.Node) -> list[Strategy]:
    """The ways to split an op that running it has proven; none where it cannot be run."""
    found = [_with_groups(node, Strategy.parse(text)) for text in answer(node).strategies]
    shapes = (len(tensor_args(node)), len(infos(node)))
    return [s for s in found if (len(s.inputs), len(s.outputs)) == shapes]


def _with_groups(node: fx.Node, strategy: Strategy) -> Strategy:
    """An answer has the size of a group; the strategy has how many there are in what is split."""
    if not strategy.groups:
        return strategy
    extents = [
        info(argument).shape[placement.dim]
        for argument, placement in zip(tensor_args(node), strategy.inputs, strict=True)
        if placement.is_shard
    ]
    size = strategy.groups
    return replace(strategy, groups=math.gcd(*(e if e % size else e // size for e in extents)))


def answer(node: fx.Node) -> Answer:
    """What trying the op has given, and why where it gave nothing."""
    refusal = _refusal(node)
    if refusal:
        return Answer(reason=refusal)
    question = ask(node)
    if question is None:
        return Answer(reason="it takes arguments that are not plain data")
    key = _key(question)
    with _lock:
        if key not in _answers:
            _answers[key] = _look_up(question, key)
        return _answers[key]


def _refusal(node: fx.Node) -> str:
    """Why the op must not be tried, or nothing."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return "it is not an op"
    if target._schema.is_mutable or mutated(node) or _has_effects(target):
        return "it has side effects"
    if draws(node) or torch.Tag.nondeterministic_seeded in target.tags:
        return "it draws random numbers"
    if any(tag in target.tags for tag in _UNTRIED):
        return "the size of its result depends on data"
    return ""


def _has_effects(target: Any) -> bool:
    """Whether the op was registered as one whose order matters (it prints, it logs)."""
    from torch._higher_order_ops import effects

    return effects._get_effect(target) is not None if hasattr(effects, "_get_effect") else False


def _key(question: Question) -> str:
    """All that an answer depends on. Sizes count by the small ones that stand for them, so by how they are related."""
    small = [s for variant in range(VARIANTS) for s in scalings(question, variant)]
    return f"rule {_METHOD} {torch.__version__} {question.schema} {[s.key for s in small]}"


def _look_up(question: Question, key: str) -> Answer:
    if question.op.partition("::")[0] not in _SHIPPED:
        return _try(question)
    from shardplan.planner.costs.store import Store

    store = Store.open()
    found = _read(store.get_text(key))
    if found is None:
        found = _try(question)
        store.put_text(key, json.dumps(asdict(found)))
    return found


def _try(question: Question) -> Answer:
    found = _laboratory.answer(question)
    log.info("%s: %s", question.op, found.reason or f"{len(found.strategies)} ways to split it")
    return found


def _read(text: str | None) -> Answer | None:
    """An answer from the store; None where there is none that can be read."""
    try:
        raw = json.loads(text or "null")
        found = Answer(tuple(map(str, raw["strategies"])), str(raw["reason"]))
        for strategy in found.strategies:
            Strategy.parse(strategy)
    except (ValueError, TypeError, KeyError):
        return None
    return found
