"""Owns the judgement of one text: one verdict of each gate, in a fixed order."""

from typing import Final

from kar.records.v1 import records_pb2
from kar_offline.check import fact_consistency, personal, relevance, text_quality
from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.name_matching import Words

__all__ = ["DUPLICATE_GATE", "GATES", "GATES_VERSION", "judge"]

GATES_VERSION: Final = 1
"""Rises when a gate changes a verdict on some text, so that records are judged again."""
GATES: Final = (
    "refusal",
    "language",
    "length",
    "complete",
    "repetition",
    "shape",
    "subject",
    "facts",
    "leak",
    "personal",
)
DUPLICATE_GATE: Final = "duplicate"
"""Name of the gate `near_duplicates`, which compares all texts."""


def judge(text: str, subject: Subject, rules: Rules, finish: str = "stop") -> tuple[records_pb2.Verdict, ...]:
    """The verdicts of all gates on one text, in the order of `GATES`. Never raises, whatever the text.

    Args:
        text: The model's text.
        subject: Facts about the entity.
        rules: What the scenario demands of such texts.
        finish: Why the text ended, as in `Reply.finish`; "length": it was cut off.
    """
    words = Words.of(text)
    mentions = tuple(words.mentions(subject.names))
    findings = (
        text_quality.refusal(words),
        text_quality.language(words, rules),
        text_quality.length(words, rules),
        text_quality.complete(words, finish),
        text_quality.repetition(words),
        text_quality.shape(words, rules),
        relevance.subject(words, subject, rules, mentions),
        fact_consistency.facts(words, subject, rules, mentions),
        relevance.leak(words, subject, rules, mentions),
        personal.personal(words, subject, rules),
    )
    return tuple(
        records_pb2.Verdict(gate=gate, outcome=finding.outcome, reason=finding.reason)
        for gate, finding in zip(GATES, findings, strict=True)
    )
