"""Rewrite: a Trace and a Plan become a Program. Never imports the runtime or torch.distributed."""
