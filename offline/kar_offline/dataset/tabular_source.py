"""Owns the source "a log of the user's own": tables of events, users and items, read as a mapping file says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.columns import (
    TITLE,
    parse_categories,
    parse_category,
    parse_id,
    parse_optional_number,
    parse_rating,
    parse_seconds,
    parse_title,
)
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.mapping import EntityColumns, EventColumns, LogMapping, SeveralCategories
from kar_offline.dataset.source import SourcedDataset
from kar_offline.dataset.table_file import TableColumn, read_columns
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError

__all__ = ["TabularSource", "read_tables"]


@dataclass(frozen=True, slots=True)
class TabularSource:
    """A log: a table of events and, if given, a table of users and a table of items."""

    mapping: LogMapping
    events: Path
    users: Path | None = None
    items: Path | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """The mapping and the content hash of each file."""
        files = {"events": self.events, "users": self.users, "items": self.items}
        hashes = {name: file_sha256(file) for name, file in files.items() if file and file.is_file()}
        return {"dataset": "table", "mapping": self.mapping.model_dump(mode="json"), "files": hashes}

    def read(self, history_length: int) -> SourcedDataset:
        """Read and check the tables; raises as `read_tables` does."""
        dataset = read_tables(self.mapping, self.events, self.users, self.items, history_length=history_length)
        return SourcedDataset(dataset, self.events.name)


def read_tables(
    mapping: LogMapping, events: Path, users: Path | None = None, items: Path | None = None, *, history_length: int
) -> Dataset:
    """Read and check a log; the dataset is split by user (fold 0).

    Args:
        mapping: The meaning of the columns.
        events: Table with one event per row.
        users: Table with one user per row; None takes the ids in the events, without features.
        items: Table with one item per row; None takes the ids in the events, without features.
        history_length: Maximal number of events in the history of a sample.

    Raises:
        NotFoundError: a file is missing.
        InputError: a file is not a table, lacks a column, or holds a wrong value; the text names file, row and column.
    """
    keys = mapping.events
    rating_column = [keys.rating] if isinstance(keys.rating, str) else []
    columns = read_columns(events, [keys.user, keys.item, keys.time, *rating_column], mapping.delimiter, "events")
    tables: dict[EntityKind, list[Entity]] = {}
    features: list[records_pb2.Feature] = []
    files = {USER: users, ITEM: items}
    sections = {USER: mapping.users, ITEM: mapping.items}
    ids = {USER: columns[keys.user], ITEM: columns[keys.item]}
    for kind in (USER, ITEM):
        file, section = files[kind], sections[kind]
        if (file is None) != (section is None):
            raise InputError(f"--{kind}s and [{kind}s] of the mapping belong together: give both or neither")
        if file and section:
            tables[kind], schema = _read_entities(kind, file, section, mapping.delimiter)
            features += schema
        else:
            tables[kind] = [Entity(entity_id, {}, {}) for entity_id in sorted(set(ids[kind].distinct(parse_id)))]
    user, item = (_entity_rows(ids[kind], tables[kind], files[kind]) for kind in (USER, ITEM))
    seconds = columns[keys.time].array(parse_seconds, np.int64)
    if not len(user):
        raise InputError(f"{events.name} has no events: name another file")
    rating = _ratings(keys, columns, len(user))
    kept = _without_repeats(user, item, seconds, keys.repeats, columns[keys.user])
    return Dataset.from_events(
        mapping.name,
        records_pb2.FeatureSchema(features=features, history_length=history_length),
        tables[USER],
        tables[ITEM],
        user=user[kept],
        item=item[kept],
        rating=rating[kept],
        time=seconds[kept],
        positive_above=mapping.positive_above,
        shared_clock=keys.shared_clock,
    )


def _read_entities(
    kind: EntityKind, path: Path, section: EntityColumns, delimiter: str
) -> tuple[list[Entity], list[records_pb2.Feature]]:
    """The users or items of a table, sorted by id, and the schema of their features."""
    names = [section.id, *section.features, *section.facts, *([section.title] if section.title else [])]
    columns = read_columns(path, names, delimiter, f"{kind}s")
    ids = columns[section.id].rows(parse_id)
    _refuse_repeated_ids(columns[section.id], ids)
    features: dict[str, list[Any]] = {}
    schema = []
    for name, feature_type in section.features.items():
        feature = records_pb2.Feature(name=name, entity=kind.number, type=records_pb2.FEATURE_TYPE_CATEGORICAL)
        if isinstance(feature_type, SeveralCategories):
            features[name] = columns[name].rows(partial(parse_categories, feature_type.separator))
            feature.width = max(map(len, features[name]), default=0) or 1
        elif feature_type == "categorical":
            features[name] = columns[name].rows(parse_category)
            feature.width = 1
        else:
            features[name] = columns[name].rows(parse_optional_number)
            feature.type = records_pb2.FEATURE_TYPE_NUMERIC
        schema.append(feature)
    facts = {name: features[name] if name in features else columns[name].rows(parse_category) for name in section.facts}
    if section.title:
        facts = {TITLE: columns[section.title].rows(parse_title), **facts}

    def values_of(row: int, columns: Mapping[str, list[Any]]) -> dict[str, Any]:
        return {name: column[row] for name, column in columns.items()}

    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [Entity(ids[row], values_of(row, features), values_of(row, facts)) for row in order], schema


def _refuse_repeated_ids(column: TableColumn, ids: Sequence[str]) -> None:
    first_row: dict[str, int] = {}
    for row, entity_id in enumerate(ids):
        if first_row.setdefault(entity_id, row) != row:
            raise InputError(
                f"{column.place(row)} {entity_id!r} was in row {first_row[entity_id] + 1:,} already: keep one"
            )


def _entity_rows(column: TableColumn, entities: Sequence[Entity], path: Path | None) -> NDArray[np.integer]:
    """The row number of each event's user or item [E]."""
    row_of_id = {entity.id: row for row, entity in enumerate(entities)}

    def find(cell: Any) -> int:
        if (row := row_of_id.get(parse_id(cell))) is None:
            raise ValueError(f"is not in {path.name if path else 'the ids'}: add it there, or remove the event")
        return row

    return column.array(find, np.int64)


def _ratings(keys: EventColumns, columns: Mapping[str, TableColumn], events: int) -> NDArray[np.float32]:
    """The rating of each event [E]."""
    if isinstance(keys.rating, str):
        return columns[keys.rating].array(partial(parse_rating, keys.values), np.float32)
    return np.full(events, parse_rating({}, keys.rating), np.float32)


def _without_repeats(
    user: NDArray[np.integer], item: NDArray[np.integer], seconds: NDArray[np.integer], rule: str, column: TableColumn
) -> NDArray[np.integer]:
    """Numbers of the events to keep, one for each pair of user and item.

    Raises:
        InputError: a pair is repeated and the rule is "refuse".
    """
    # Stable sorts: events that compare equal stay in the order of their rows.
    order = np.lexsort((item, user) if rule == "refuse" else (seconds, item, user))
    repeats_previous = np.zeros(len(order), bool)
    repeats_previous[1:] = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
    if rule == "refuse" and repeats_previous.any():
        row = int(order[repeats_previous].min())
        first_row = int(np.argmax((user == user[row]) & (item == item[row])))
        raise InputError(
            f"{column.place(row)} and its item repeat the pair of row {first_row + 1:,}: remove one row, "
            'or set repeats = "first" or "last" in [events] of the mapping'
        )
    kept = ~repeats_previous if rule == "first" else ~np.append(repeats_previous[1:], False)
    return np.sort(order[kept])
