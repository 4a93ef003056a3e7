"""Owns offline evaluation: metrics of trained models on test users, with intervals, as a table."""

from kar_offline.evaluate.stage import evaluate
from kar_offline.evaluate.table import evaluation_table

__all__ = ["evaluate", "evaluation_table"]
