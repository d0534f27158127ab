"""Rewrite: a Trace and a Plan become a Program. Never imports the runtime or torch.distributed."""

from shardplan.rewrite.compile import compile

__all__ = ["compile"]
