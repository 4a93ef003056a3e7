"""Owns knowledge records on disk: `item.jsonl` and `user.jsonl`, one kar.records.v1.KnowledgeRecord a line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from google.protobuf import json_format

from kar.records.v1 import records_pb2
from kar_sidecar.errors import IntegrityError, PreconditionError

__all__ = ["ENTITY", "KINDS", "parse_record", "read_knowledge", "record_line", "write_knowledge"]

KINDS: Final = ("item", "user")
ENTITY: Final = {"item": records_pb2.ENTITY_KIND_ITEM, "user": records_pb2.ENTITY_KIND_USER}


def record_line(record: records_pb2.KnowledgeRecord) -> str:
    """A record as one line of JSON, without the line end."""
    return json_format.MessageToJson(record, preserving_proto_field_name=True, indent=None)


def parse_record(line: str) -> records_pb2.KnowledgeRecord:
    """The record of a line.

    Raises:
        json_format.ParseError: the line is no record.
    """
    return json_format.Parse(line, records_pb2.KnowledgeRecord())


def write_knowledge(folder: Path, records: Iterable[records_pb2.KnowledgeRecord]) -> None:
    """Write both files, in the order of the records."""
    lines: dict[int, list[str]] = {entity: [] for entity in ENTITY.values()}
    for record in records:
        lines[record.entity].append(record_line(record) + "\n")
    for kind in KINDS:
        (folder / f"{kind}.jsonl").write_text("".join(lines[ENTITY[kind]]))


def read_knowledge(folder: Path, kind: str) -> list[records_pb2.KnowledgeRecord]:
    """The records of one kind, "item" or "user".

    Raises:
        PreconditionError: there is no knowledge.
        IntegrityError: a line is no record; the text names it.
    """
    path = folder / f"{kind}.jsonl"
    if not path.is_file():
        raise PreconditionError(f"no knowledge in {folder}: run `kar generate` first")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(parse_record(line))
        except json_format.ParseError as error:
            raise IntegrityError(f"{path}:{number} is not a knowledge record ({error}): generate it again") from error
    return records
