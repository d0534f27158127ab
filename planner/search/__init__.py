"""The search: from a trace, a cluster and prices to a plan with a certificate."""

from shardplan.planner.search.options import SolveOptions
from shardplan.planner.search.search import solve

__all__ = ["SolveOptions", "solve"]
