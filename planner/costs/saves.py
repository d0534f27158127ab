"""What autograd keeps of an op for its backward: watched by saved-tensor hooks while the op runs on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.node import map_arg

from shardplan.planner.costs.base import OpSaves
from shardplan.planner.rules import schema
from shardplan.planner.rules.randomness import draws
from shardplan.planner.trace import info, infos, is_tensor, leaf_of, needs_grad, tensor_args


def key_of(node: fx.Node) -> str:
    """Everything that the answer for a node depends on: layers of the same kind share it."""
    order: dict[fx.Node, int] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            number = order.setdefault(value, len(order))  # the same tensor twice is kept once
            meta = value.meta.get("val")
            if not isinstance(meta, torch.Tensor):
                return f"#{number}:{meta}"
            return f"#{number}:{meta.dtype}{list(meta.shape)}{list(meta.stride())}{needs_grad(value)}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(text, value)) + "]"
        return str(value)

    kwargs = ",".join(f"{name}={text(value)}" for name, value in sorted(node.kwargs.items()))
    return f"{node.target}({text(node.args)},{kwargs})->{[(str(r.dtype), r.needs_grad) for r in infos(node)]}"


def observe(node: fx.Node, torch_device: str = "cpu") -> OpSaves:
    """What the op keeps at its global shapes on a kind of device ("cpu" or "cuda"). Where it cannot be run by itself:
    arguments and results, all of them."""
    arguments = tensor_args(node)
    results = infos(node)
    if not any(result.needs_grad for result in results):
        return OpSaves((False,) * len(arguments), (False,) * len(results))
    if torch_device == "cuda" and _is_fused_attention(node):
        return _fused_attention(node)
    note = leaf_of(node)
    if note is not None:
        return note.saves
    try:
        return _observe(node)
    except Exception:
        return OpSaves(tuple(needs_grad(a) for a in arguments), tuple(r.dtype.is_floating_point for r in results))


def _is_fused_attention(node: fx.Node) -> bool:
    """Whether CUDA runs the op without the matrix of scores. Its kernels take masks, which those of the CPU that are
    watched here do not all; grouped heads only flash attention takes: half precision, no mask. With dropout a rank
    computes the scores itself (`rewrite.random_ops`)."""
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default or draws(node):
        return False
    dtype = infos(node)[0].dtype
    if schema.argument(node, "enable_gqa"):
        return dtype in (torch.bfloat16, torch.float16) and schema.argument(node, "attn_mask") is None
    return dtype in (torch.bfloat16, torch.float16, torch.float32)


def _fused_attention(node: fx.Node) -> OpSaves:
    """Operands, result and one fp32 number per row: the logarithm of the sum of exponentials."""
    result = infos(node)[0]
    return OpSaves((True,) * len(tensor_args(node)), (True,), 4 / (result.shape[-1] * result.dtype.itemsize))


def _observe(node: fx.Node) -> OpSaves:
    arguments = tensor_args(node)
    results = infos(node)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        made: dict[fx.Node, Any] = {}
        for argument in arguments:
            if argument not in made:
                if not is_tensor(argument):
                    raise TypeError("an argument is a tuple of tensors")
                made[argument] = _fake(argument)
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: made.get(n, n.meta.get("val")))
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            found = node.target(*args, **kwargs)  # type: ignore[operator]
    outputs = [t for t in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(t, torch.Tensor)]
    ins = [made[argument] for argument in arguments]
    in_memory = {_memory(tensor) for tensor in ins}
    memories = {_memory(tensor): tensor for tensor in kept}
    out_memory = {_memory(tensor) for tensor in outputs} - in_memory
    keeps_input = [_memory(tensor) in memories for tensor in ins]
    whole = sum(result.nbytes for result in results)
    extra = 0
    for key, tensor in memories.items():
        if key in in_memory or key in out_memory:
            continue
        nbytes = tensor.untyped_storage().nbytes()
        twin = _twin(nbytes, whole, arguments, keeps_input)
        if twin is None:
            extra += nbytes
        else:
            keeps_input[twin] = True
    return OpSaves(
        tuple(keeps_input),
        tuple(_memory(t) in memories and _memory(t) in out_memory for t in outputs),
        extra / whole if whole else 0.0,
    )


def _twin(nbytes: int, whole: int, arguments: tuple[fx.Node, ...], keeps_input: list[bool]) -> int | None:
    """The argument that stands for a saved tensor which is larger than the results and so cannot be scaled with them,
    such as the log-probabilities that a mean loss keeps: they are as large, and split as, the logits."""
    if nbytes <= whole:
        return None
    for index, argument in enumerate(arguments):
        if not keeps_input[index] and needs_grad(argument) and info(argument).nbytes == nbytes:
            return index
    return None


def _fake(node: fx.Node) -> torch.Tensor:
    """A fake tensor on the CPU with the node's shape, strides and dtype; not a leaf, so that it may be written to."""
    value = node.meta["val"]
    made = torch.empty_strided(
        [int(extent) for extent in value.shape], [int(step) for step in value.stride()], dtype=value.dtype
    )
    if info(node).needs_grad:
        made = made.requires_grad_().view_as(made)
    return made


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
