"""Step time and memory of a training job from a table row alone: no model object, no measurement."""

from shardplan.planner.analytic.predict import predict, predict_row
from shardplan.planner.analytic.row import Row, read_row

__all__ = ["Row", "predict", "predict_row", "read_row"]
