"""Owns the records of generation tasks: texts with provenance and verdicts, and records of imputed vectors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from kar.records.v1 import records_pb2
from kar_offline.generate.collective import CLUSTER_PREFIX
from kar_offline.generate.provider import CachedAnswer, Reply
from kar_offline.generate.task import GenerationTask
from kar_offline.prompts import Prompt
from kar_sidecar.entities import EntityKind

__all__ = ["answers_sha256", "imputed_records", "is_about_cluster", "keep_record", "task_record"]

UNKNOWN: Final = "unknown"


def task_record(task: GenerationTask, provenance: str) -> records_pb2.KnowledgeRecord | None:
    """The record of a task; None where there is no answer yet.

    Args:
        task: A task that was judged if it has an answer.
        provenance: The model and its parameters.
    """
    prompt, last = task.prompt, task.last
    if last.answer is None:
        return None
    outcome, answered_at = last.answer
    record = records_pb2.KnowledgeRecord(
        id=prompt.id,
        entity=prompt.entity.number,
        text=last.text,
        template=prompt.template,
        prompt_sha256=last.question.prompt_sha256,
        llm=provenance,
        history_cutoff=prompt.history_cutoff,
        context=prompt.context,
        verdicts=last.verdicts,
        retries=len(task.attempts) - 1,
    )
    origin = outcome.origin if isinstance(outcome, Reply) else None
    if origin is None:
        record.created_at.FromDatetime(answered_at)
        if expires_at := _expiry(prompt, answered_at):
            record.expires_at.FromDatetime(expires_at)
    else:  # the text was written for another prompt, so its context and its expiry are not known
        record.template, record.llm, record.confidence = origin.template, origin.llm, origin.confidence
        record.prompt_sha256 = UNKNOWN
        record.ClearField("context")
        if origin.created_at:
            record.created_at.FromDatetime(origin.created_at)
    return record


def keep_record(task: GenerationTask, record: records_pb2.KnowledgeRecord) -> GenerationTask:
    """Answer a task with an existing record, so that new texts are compared with its text."""
    reply = Reply(record.text, 0, 0, requests=0)
    task.last.answer = CachedAnswer(reply, record.created_at.ToDatetime(UTC))
    return task


def is_about_cluster(prompt: Prompt) -> bool:
    """Whether a prompt is about a cluster of entities."""
    return prompt.id.startswith(CLUSTER_PREFIX)


def imputed_records(
    neighbours: Mapping[tuple[EntityKind, str], Sequence[records_pb2.Loan]],
    records: Sequence[records_pb2.KnowledgeRecord],
    clusters: Sequence[records_pb2.KnowledgeRecord],
    provenance: str,
) -> list[records_pb2.KnowledgeRecord]:
    """Records with neighbours and weights, for entities that have no text in use but neighbours with one.

    Args:
        neighbours: By kind and id, the neighbours of an entity.
        records: Records of entities whose text is in use.
        clusters: Records of clusters whose text is in use.
        provenance: The model and its parameters.
    """
    with_own_text = {(record.entity, record.id) for record in records}
    in_use = {(record.entity, record.id) for record in (*records, *clusters)}
    imputed = []
    for (kind, id_), candidates in neighbours.items():
        usable = [neighbour for neighbour in candidates if (kind.number, neighbour.id) in in_use]
        if (kind.number, id_) not in with_own_text and usable:
            total = sum(neighbour.weight for neighbour in usable)
            loans = [records_pb2.Loan(id=neighbour.id, weight=neighbour.weight / total) for neighbour in usable]
            imputed.append(records_pb2.KnowledgeRecord(id=id_, entity=kind.number, llm=provenance, loans=loans))
    return imputed


def answers_sha256(tasks: Sequence[GenerationTask]) -> str:
    """Content hash of the last answers and their verdicts."""
    digest = hashlib.sha256()
    for task in tasks:
        answer, verdicts = task.last.answer, [[v.gate, v.outcome, v.reason] for v in task.last.verdicts]
        # The time when a pack was read does not matter; the time of a model's answer becomes part of the record.
        from_pack = answer and isinstance(answer.outcome, Reply) and answer.outcome.origin
        answered_at = answer.answered_at.isoformat() if answer and not from_pack else None
        outcome = answer and answer.outcome._asdict()
        line = json.dumps([task.prompt.entity, task.prompt.id, outcome, answered_at, verdicts], default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _expiry(prompt: Prompt, answered_at: datetime) -> datetime | None:
    """When a text expires: by its age or with its season, whichever comes first; None: never."""
    ends = []
    if prompt.expires_after_days is not None:
        ends.append(answered_at + timedelta(days=prompt.expires_after_days))
    if prompt.expires_on is not None:
        ends.append(datetime.fromisoformat(prompt.expires_on).replace(tzinfo=UTC) + timedelta(days=1))
    return min(ends, default=None)
