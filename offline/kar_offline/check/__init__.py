"""Owns quality gates: what is wrong with a text that a language model wrote, before anything is made of it."""

from kar_offline.check.duplicates import near_duplicates
from kar_offline.check.facts import FactsTable, facts_table
from kar_offline.check.gate_context import Rules, Subject, subjects
from kar_offline.check.gates import DUPLICATE_GATE, GATES, GATES_VERSION, judge

__all__ = [
    "DUPLICATE_GATE",
    "GATES",
    "GATES_VERSION",
    "FactsTable",
    "Rules",
    "Subject",
    "facts_table",
    "judge",
    "near_duplicates",
    "subjects",
]
