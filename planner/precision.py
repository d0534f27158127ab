"""Training in a lower precision with master weights: what `precision="bf16"` means.

Parameters in float32 are used in bfloat16; the float32 ones are kept as masters: the optimizer steps on them, gradients
of microbatches and replicas add up in float32, and checkpoints hold them. A master is rounded once a step. Floating
inputs of the model are rounded where it is entered, and its floating outputs are float32 again, so a loss function sees
float32. Everything between runs in bfloat16, whose kernels keep the sums of products, softmax and norms in float32
inside, with two exceptions:

- losses of `torch.nn.functional` within the model take float32 (as under `torch.autocast`);
- norms with running statistics (BatchNorm, InstanceNorm) keep float32 parameters and statistics, and buffers are never
  rounded: rotary frequencies, statistics and masks are what they were.

float16 is refused: gradients below its range vanish unless the loss is scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardplan.errors import NotSupported, UsageError

PRECISIONS = ("bf16",)
_MASTER = torch.float32
_LOSSES = frozenset(
    {
        F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
        F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.gaussian_nll_loss,
        F.cosine_embedding_loss, F.hinge_embedding_loss, F.margin_ranking_loss, F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss, F.multi_margin_loss, F.soft_margin_loss, F.triplet_margin_loss, F.ctc_loss,
    }
)  # fmt: skip


def compute_dtype(precision: str | None) -> torch.dtype | None:
    """What parameters are used in; None: as they are. Raises NotSupported, UsageError."""
    if precision is None:
        return None
    if precision in ("fp16", "float16", "half"):
        raise NotSupported(
            f"precision={precision!r}",
            ["small gradients vanish in float16 unless the loss is scaled"],
            ['precision="bf16" needs no scaling'],
        )
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r}", hints=['None (as the model is) or "bf16"'])
    return torch.bfloat16


def lowered(model: nn.Module) -> set[int]:
    """ids of the parameters that are used in the lower precision."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = {id(p) for norm in norms for p in norm.parameters()}
    return {id(p) for p in model.parameters() if p.dtype == _MASTER and id(p) not in kept}


def lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model compute by itself what ranks compute with it: its parameters are rounded in place."""
    chosen = lowered(model)
    for parameter in model.parameters():
        if id(parameter) in chosen:
            parameter.data = parameter.data.to(dtype)
    model.forward = partial(call, model.forward, dtype)


def call(function: Callable[..., Any], dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Call a model whose parameters are in `dtype`, see the module docstring. None: an ordinary call."""
    if dtype is None:
        return function(*args, **kwargs)
    args, kwargs = _converted((args, kwargs), _MASTER, dtype)
    with _WideLosses(dtype):
        found = function(*args, **kwargs)
    return _converted(found, dtype, _MASTER)


class _WideLosses(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:
            args, kwargs = _converted((args, kwargs), self._dtype, _MASTER)
        return func(*args, **kwargs)


def _converted(values: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(target) if t.dtype == source else t, values)
