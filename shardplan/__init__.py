"""shardplan: auto_parallel(model, devices) for PyTorch."""

__version__ = "0.1.0"
