"""Planner: trace a model, price its ops, search for a plan. Imports neither torch.distributed nor the runtime."""
