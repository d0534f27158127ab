"""Write `view` as `reshape`: on one rank a part of a tensor need not have strides that allow a view."""

from __future__ import annotations

import torch

from shardplan.planner.passes.draft import Draft

name = "reshape-views"

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def apply(draft: Draft) -> None:
    for node in draft.ops():
        if node.target in VIEWS:
            node.target = torch.ops.aten.reshape.default
