"""Runtime: runs a Program on torch.distributed. Never imports a solver."""
