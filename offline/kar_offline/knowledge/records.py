"""Owns knowledge records on disk, one kar.records.v1.KnowledgeRecord a line.

{item,user}.jsonl             one record an entity: its own text, or the neighbours (`loans`) to impute its vector from
{item,user}_clusters.jsonl    texts about clusters of entities, which can be neighbours too; only if there are any
quarantine.jsonl              records that a quality gate refused, with their verdicts
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from google.protobuf import json_format

from kar.records.v1 import records_pb2
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import IntegrityError, PreconditionError

__all__ = [
    "parse_record",
    "read_clusters",
    "read_knowledge",
    "read_quarantine",
    "record_line",
    "write_knowledge",
    "write_quarantine",
]

QUARANTINE: Final = "quarantine.jsonl"


def record_line(record: records_pb2.KnowledgeRecord) -> str:
    """A record as one line of JSON, without the line end."""
    return json_format.MessageToJson(record, preserving_proto_field_name=True, indent=None)


def parse_record(line: str) -> records_pb2.KnowledgeRecord:
    """The record of a line.

    Raises:
        json_format.ParseError: the line is not a record.
    """
    return json_format.Parse(line, records_pb2.KnowledgeRecord())


def write_knowledge(
    folder: Path,
    records: Iterable[records_pb2.KnowledgeRecord],
    clusters: Iterable[records_pb2.KnowledgeRecord] = (),
) -> None:
    """Write the files, in the order of the records."""
    for suffix, group in (("", records), ("_clusters", clusters)):
        lines: dict[int, list[str]] = {kind.number: [] for kind in EntityKind}
        for record in group:
            lines[record.entity].append(record_line(record) + "\n")
        for kind in EntityKind:
            path = folder / f"{kind}{suffix}.jsonl"
            if lines[kind.number] or not suffix:
                path.write_text("".join(lines[kind.number]))
            else:
                path.unlink(missing_ok=True)


def write_quarantine(folder: Path, records: Iterable[records_pb2.KnowledgeRecord]) -> None:
    """Write the refused records of both kinds, for people to read."""
    (folder / QUARANTINE).write_text("".join(record_line(record) + "\n" for record in records))


def read_quarantine(folder: Path) -> list[records_pb2.KnowledgeRecord]:
    """The refused records of both kinds; errors as for `read_knowledge`."""
    path = folder / QUARANTINE
    return _read(path) if path.is_file() else []


def read_knowledge(folder: Path, kind: str) -> list[records_pb2.KnowledgeRecord]:
    """The records of one kind of entities, "item" or "user".

    Raises:
        PreconditionError: there is no knowledge.
        IntegrityError: a line is not a record; the text names it.
    """
    path = folder / f"{kind}.jsonl"
    if not path.is_file():
        raise PreconditionError(f"no knowledge in {folder}: run `kar generate` first")
    return _read(path)


def read_clusters(folder: Path, kind: str) -> list[records_pb2.KnowledgeRecord]:
    """The records about clusters of one kind of entities; empty where nothing was clustered.

    Raises:
        IntegrityError: a line is not a record; the text names it.
    """
    path = folder / f"{kind}_clusters.jsonl"
    return _read(path) if path.is_file() else []


def _read(path: Path) -> list[records_pb2.KnowledgeRecord]:
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(parse_record(line))
        except json_format.ParseError as error:
            raise IntegrityError(f"{path}:{number} is not a knowledge record ({error}): generate it again") from error
    return records
