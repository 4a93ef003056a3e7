"""Owns offline evaluation: metrics, intervals, the side-by-side table on test users."""

from kar_offline.evaluate.stage import evaluate
from kar_offline.evaluate.table import evaluation_table

__all__ = ["evaluate", "evaluation_table"]
