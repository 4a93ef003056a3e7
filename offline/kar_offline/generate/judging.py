"""Owns the judging of answers: each by the gates of `check`, then all of one kind for near-duplicates."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from kar.records.v1 import records_pb2
from kar_offline.check import DUPLICATE_GATE, judge, near_duplicates
from kar_offline.generate.provider import Failure
from kar_offline.generate.task import Attempt, GenerationTask
from kar_sidecar.entities import EntityKind

__all__ = ["gate_counts", "judge_tasks"]

NO_TEXT: Final = "answer"
"""Name of the verdict on an answer without a text."""


def judge_tasks(tasks: Sequence[GenerationTask], fresh: Sequence[GenerationTask]) -> None:
    """Set the verdicts of the last attempts.

    Args:
        tasks: All tasks whose texts must differ from each other.
        fresh: The tasks with a new answer; every gate judges these.
    """
    for task in fresh:
        if task.last.answer is not None:
            task.last.verdicts = _own_verdicts(task)
    for kind in dict.fromkeys(task.prompt.entity for task in tasks):
        _judge_duplicates([task for task in tasks if task.prompt.entity == kind], kind)


def _own_verdicts(task: GenerationTask) -> tuple[records_pb2.Verdict, ...]:
    """The verdicts on an answer that do not depend on other answers."""
    assert task.last.answer is not None
    outcome = task.last.answer.outcome
    if isinstance(outcome, Failure) or not outcome.text:
        reason = outcome.reason if isinstance(outcome, Failure) else "the model wrote nothing"
        return (records_pb2.Verdict(gate=NO_TEXT, outcome=records_pb2.OUTCOME_FAILED, reason=reason),)
    return judge(outcome.text, task.subject, task.rules, outcome.finish)


def _judge_duplicates(tasks: Sequence[GenerationTask], kind: EntityKind) -> None:
    """Set the duplicate gate's verdict on tasks of one kind that no other gate refuses."""
    # Entities with equal prompts share an answer; those texts are equal on purpose and count once.
    sharing: dict[tuple[str, str], list[Attempt]] = {}
    first: dict[str, GenerationTask] = {}
    for task in tasks:
        if task.last.text and set(task.last.refused_by) <= {DUPLICATE_GATE}:
            attempts = sharing.setdefault((task.last.question.prompt_sha256, task.last.text), [])
            if not attempts:
                first[task.prompt.id] = task
            attempts.append(task.last)
    duplicates = near_duplicates(
        {id_: task.last.text for id_, task in first.items()}, {id_: task.subject for id_, task in first.items()}
    )
    for attempts in sharing.values():
        verdict = _duplicate_verdict(duplicates.get(attempts[0].question.id), kind)
        for attempt in attempts:
            others = (verdict for verdict in attempt.verdicts if verdict.gate != DUPLICATE_GATE)
            attempt.verdicts = (*others, verdict)


def _duplicate_verdict(duplicate: tuple[str, float] | None, kind: EntityKind) -> records_pb2.Verdict:
    if duplicate is None:
        return records_pb2.Verdict(gate=DUPLICATE_GATE, outcome=records_pb2.OUTCOME_PASSED)
    original_id, similarity = duplicate
    reason = f"{similarity:.0%} of its wording is that of {kind} {original_id}"
    return records_pb2.Verdict(gate=DUPLICATE_GATE, outcome=records_pb2.OUTCOME_FAILED, reason=reason)


def gate_counts(tasks: Iterable[GenerationTask]) -> dict[str, int]:
    """The number of last attempts that each gate refuses, by the gate's name."""
    return dict(Counter(gate for task in tasks for gate in task.last.refused_by))
