"""Owns the content of a folder of knowledge records as one value."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kar.records.v1 import records_pb2
from kar_offline.knowledge.records import read_clusters, read_knowledge, read_quarantine
from kar_sidecar.entities import EntityKind

__all__ = ["Knowledge", "RecordsByKind", "records_by_kind"]

RecordsByKind = Mapping[EntityKind, Mapping[str, records_pb2.KnowledgeRecord]]
"""Knowledge records by kind and id."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Knowledge records, in the order of their files."""

    FOLDER: ClassVar[str] = "knowledge"

    records: RecordsByKind
    """Records of entities."""
    clusters: RecordsByKind
    """Records of clusters of entities."""
    quarantine: Sequence[records_pb2.KnowledgeRecord]
    """Records that a quality gate refused."""

    @staticmethod
    def load(folder: Path) -> "Knowledge":
        """Read all records of a folder.

        Raises:
            PreconditionError: there are no records.
            IntegrityError: a line is not a record; the text names it.
        """
        return Knowledge(
            {kind: {record.id: record for record in read_knowledge(folder, kind)} for kind in EntityKind},
            {kind: {record.id: record for record in read_clusters(folder, kind)} for kind in EntityKind},
            read_quarantine(folder),
        )


def records_by_kind(records: Iterable[records_pb2.KnowledgeRecord]) -> RecordsByKind:
    """Group records by kind and id, in their order."""
    grouped: dict[EntityKind, dict[str, records_pb2.KnowledgeRecord]] = {kind: {} for kind in EntityKind}
    for record in records:
        grouped[EntityKind.of_number(record.entity)][record.id] = record
    return grouped
