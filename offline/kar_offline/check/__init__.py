"""Owns quality gates: they judge each text of a language model before it is used."""

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
