"""Owns anyone's logs: Parquet or CSV tables, and the mapping file that says what their columns mean.

Rows are counted from the first row of data, so that of a CSV file line 2 is row 1.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv, parquet
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.stage import Split, write_dataset
from kar_offline.stage_runner import StageResult
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import InputError, NotFoundError

__all__ = ["Mapped", "build_tables", "load_mapping", "read_tables"]

HIGHEST_RATING: Final = 10.0
"""Models read ratings as half points from 0 to here."""
LATEST_S: Final = 10**11
"""Greater numbers are no seconds since 1970, but milliseconds."""
MOST_VALUES: Final = 64
"""Categories of one entity in one feature: every row of the store has room for as many as the longest."""
UNSTORABLE: Final = re.compile(r"[\0\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")

TITLE: Final = "title"
"""What prompts call the name of an entity."""

Word = Annotated[str, Field(min_length=1)]
T = TypeVar("T")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Events(_Part):
    """Columns of the events, one event a row."""

    user: Word
    item: Word
    time: Word
    """Whole seconds since 1970, or ISO dates and times (UTC where they name no zone)."""
    rating: Word | Annotated[float, Field(ge=0, le=HIGHEST_RATING)]
    """The column, or one number for all events."""
    values: Mapping[str, float] = Field(default_factory=dict)
    """What the texts of the rating column count, such as `view = 1`, `purchase = 5`."""
    repeats: Literal["refuse", "first", "last"] = "refuse"
    """Which event counts where one user has several with one item."""
    shared_clock: bool = True
    """False where `time` is only each user's own order."""


class _Several(_Part):
    """A feature of several categories in one text."""

    separator: Word


class _Entities(_Part):
    """Columns of the users or items, one a row."""

    id: Word
    title: Word | None = None
    """The column that names the entity in prompts."""
    features: Mapping[Word, Literal["numeric", "categorical"] | _Several] = Field(default_factory=dict)
    facts: tuple[Word, ...] = ()
    """Columns that prompts show; nothing else is told to a language model."""

    @model_validator(mode="after")
    def _one_title(self) -> Self:
        if self.title not in (None, TITLE) and TITLE in self.facts:
            raise ValueError(f"{self.title!r} and the fact {TITLE!r} would both be the title: leave one out")
        return self


class Mapped(_Part):
    """What a mapping file holds; unknown keys are refused."""

    name: Word
    positive_above: float
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Of CSV files."""
    events: _Events
    users: _Entities | None = None
    items: _Entities | None = None


def load_mapping(path: Path) -> Mapped:
    """Read a mapping file.

    Raises:
        NotFoundError: no such file.
        InputError: not TOML, or a key is missing, unknown or wrong.
    """
    if not path.is_file():
        raise NotFoundError(f"mapping file {path} does not exist: name another")
    try:
        return Mapped.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"mapping file {path} is not valid ({wrong}): correct it") from error
    except ValueError as error:
        raise InputError(f"mapping file {path} is not TOML ({error}): correct it") from error


class _Column:
    """One column of a table: its distinct values in the order of their first rows, and which one each row has."""

    def __init__(self, path: Path, name: str, column: pa.ChunkedArray) -> None:
        self.path, self.name = path, name
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_timestamp(column.type):
            column = pc.cast(column, pa.timestamp("s", tz=column.type.tz), safe=False)
        if pa.types.is_nested(column.type):
            self.values: list[Any] = column.to_pylist()
            self.codes: NDArray[np.integer] = np.arange(len(column))
        else:
            encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
            if isinstance(encoded, pa.ChunkedArray):  # of an empty table
                encoded = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), pa.array([], column.type))
            self.values, self.codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def parse(self, parse: Callable[[Any], T]) -> list[T]:
        """What `parse` makes of each distinct value; its ValueError completes the sentence "the value ..."."""
        parsed = []
        for code, value in enumerate(self.values):
            try:
                parsed.append(parse(value))
            except ValueError as error:
                shown = "" if value is None else f"{value!r} "
                raise InputError(f"{self.place(int(np.argmax(self.codes == code)))} {shown}{error}") from error
        return parsed

    def rows(self, parse: Callable[[Any], T]) -> list[T]:
        """`parse` of every row."""
        parsed = self.parse(parse)
        return [parsed[code] for code in self.codes]

    def array(self, parse: Callable[[Any], float], dtype: type[np.number]) -> NDArray:
        """`parse` of every row as an array."""
        return np.array(self.parse(parse), dtype)[self.codes]

    def place(self, row: int) -> str:
        """Where a value is, in words."""
        return f"{self.path.name} row {row + 1:,}: {self.name}"


def _columns(path: Path, names: Sequence[str], delimiter: str, section: str) -> dict[str, _Column]:
    """The named columns of a file.

    Raises:
        NotFoundError: no such file.
        InputError: it is no table, or lacks a column.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: name a Parquet or CSV file")
    wanted = list(dict.fromkeys(names))
    how = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        if path.suffix == ".parquet":
            there = parquet.read_schema(path).names
        else:
            with csv.open_csv(path, parse_options=how) as opened:
                there = opened.schema.names
        if absent := [name for name in wanted if there.count(name) != 1]:
            raise InputError(
                f"{path.name} has no column {absent[0]!r}, or several (its columns: {', '.join(there)}): "
                f"correct [{section}] of the mapping"
            )
        if path.suffix == ".parquet":
            table = parquet.read_table(path, columns=wanted)
        else:
            text = csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted)
            # One thread: only then do messages about broken rows count them.
            table = csv.read_csv(path, csv.ReadOptions(use_threads=False), how, text)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path.name} cannot be read as a table ({error}): correct it") from error
    return {name: _Column(path, name, table[name]) for name in wanted}


def _id(value: Any) -> str:
    if value is None or not str(value).strip():
        raise ValueError("is empty: give every row an id")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("is no id: make the column text or whole numbers")
    if UNSTORABLE.search(text := str(value)):
        raise ValueError("holds a NUL or a line break: remove it")
    return text


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("is no number: correct it or remove the row")
    return number


def _rating(values: Mapping[str, float], value: Any) -> float:
    if values and str(value) not in values:
        raise ValueError(f"is none of {', '.join(values)}: add it to [events.values] of the mapping")
    number = values[str(value)] if values else _number(value)
    if not 0 <= number <= HIGHEST_RATING:
        raise ValueError(f"is not from 0 to {HIGHEST_RATING:g}: scale the ratings")
    return number


def _seconds(value: Any) -> int:
    try:
        if isinstance(value, str):
            value = int(value) if value.strip().lstrip("-").isdecimal() else datetime.fromisoformat(value)
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime.combine(value, time())
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        seconds = math.floor(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("is no timestamp: give seconds since 1970 or an ISO date and time") from error
    if abs(seconds) > LATEST_S:
        raise ValueError("is too great for seconds since 1970: divide milliseconds by 1000")
    return seconds


def _category(value: Any) -> str | None:
    whole = isinstance(value, float) and value.is_integer()
    return None if value is None else (str(int(value)) if whole else str(value).strip()) or None


def _optional_number(value: Any) -> float | None:
    return None if _category(value) is None else _number(value)


def _title(value: Any) -> str:
    if (title := _category(value)) is None:
        raise ValueError("is empty: give it a title")
    return title


def _categories(separator: str, value: Any) -> list[str]:
    parts = value if isinstance(value, list) else (_category(value) or "").split(separator)
    categories = [text for part in parts if (text := _category(part)) is not None]
    if len(categories) > MOST_VALUES:
        raise ValueError(f"has {len(categories)} values: keep at most {MOST_VALUES}")
    return categories


def _entities(path: Path, part: _Entities, delimiter: str, section: str) -> tuple[list[Entity], list[dict[str, Any]]]:
    """The users or items of a table, sorted by id, and the schema of their features."""
    names = [part.id, *part.features, *part.facts, *([part.title] if part.title else [])]
    columns = _columns(path, names, delimiter, section)
    ids = columns[part.id].rows(_id)
    _refuse_repeated(columns[part.id], ids)
    known: dict[str, list[Any]] = {}
    schema = []
    for name, kind in part.features.items():
        if isinstance(kind, _Several):
            known[name] = columns[name].rows(partial(_categories, kind.separator))
            width = max(map(len, known[name]), default=0) or 1
        else:
            known[name] = columns[name].rows(_optional_number if kind == "numeric" else _category)
            width = int(kind == "categorical")
        numeric = kind == "numeric"
        feature_type = records_pb2.FEATURE_TYPE_NUMERIC if numeric else records_pb2.FEATURE_TYPE_CATEGORICAL
        schema.append({"name": name, "type": feature_type, "width": width})
    told = {name: known[name] if name in known else columns[name].rows(_category) for name in part.facts}
    if part.title:
        told = {TITLE: columns[part.title].rows(_title), **told}

    def at(row: int, values: Mapping[str, list[Any]]) -> dict[str, Any]:
        return {name: column[row] for name, column in values.items()}

    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [Entity(ids[row], at(row, known), at(row, told)) for row in order], schema


def _refuse_repeated(column: _Column, ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, entity_id in enumerate(ids):
        if first.setdefault(entity_id, row) != row:
            before = first[entity_id] + 1
            raise InputError(f"{column.place(row)} {entity_id!r} was in row {before:,} already: keep one")


def _rows_of(column: _Column, entities: Sequence[Entity], path: Path | None) -> NDArray[np.integer]:
    """The row number of each event's user or item."""
    index = {entity.id: row for row, entity in enumerate(entities)}

    def find(value: Any) -> int:
        if (row := index.get(_id(value))) is None:
            raise ValueError(f"is not in {path.name if path else 'the ids'}: add it there, or remove the event")
        return row

    return column.array(find, np.int64)


def _chosen(
    user: NDArray[np.integer], item: NDArray[np.integer], seconds: NDArray[np.integer], rule: str, column: _Column
) -> NDArray[np.integer]:
    """The events [E] to keep of those where one user has several with one item."""
    # Stable: events that compare equal stay in the order of their rows.
    order = np.lexsort((item, user) if rule == "refuse" else (seconds, item, user))
    again = np.zeros(len(order), bool)
    again[1:] = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
    if rule == "refuse" and again.any():
        row = int(order[again].min())
        before = int(np.argmax((user == user[row]) & (item == item[row])))
        raise InputError(
            f"{column.place(row)} and its item were together in row {before + 1:,} already: remove one, "
            'or set repeats = "first" or "last" in [events] of the mapping'
        )
    keep = ~again if rule == "first" else ~np.append(again[1:], False)
    return np.sort(order[keep])


def read_tables(
    mapping: Mapped, events: Path, users: Path | None = None, items: Path | None = None, *, history_length: int
) -> Dataset:
    """Read and check a log, split by user (fold 0).

    Args:
        mapping: What the columns mean.
        events: The events, one a row.
        users: The users, one a row; None takes the ids of the events, without features.
        items: The items, likewise.
        history_length: The number of events before a target that models read.

    Raises:
        NotFoundError: a file is missing.
        InputError: a file is no table, lacks a column, or holds a wrong value; the text names file, row and column.
    """
    part = mapping.events
    rated = [part.rating] if isinstance(part.rating, str) else []
    columns = _columns(events, [part.user, part.item, part.time, *rated], mapping.delimiter, "events")
    kinds = (
        ("users", users, mapping.users, part.user, records_pb2.ENTITY_KIND_USER),
        ("items", items, mapping.items, part.item, records_pb2.ENTITY_KIND_ITEM),
    )
    entities: list[list[Entity]] = []
    features = []
    for section, path, entity_part, key, kind in kinds:
        if (path is None) != (entity_part is None):
            raise InputError(f"--{section} and [{section}] of the mapping belong together: give both or neither")
        if path and entity_part:
            found, schema = _entities(path, entity_part, mapping.delimiter, section)
            features += [records_pb2.Feature(entity=kind, **feature) for feature in schema]
        else:
            found = [Entity(entity_id, {}, {}) for entity_id in sorted(set(columns[key].parse(_id)))]
        entities.append(found)
    user = _rows_of(columns[part.user], entities[0], users)
    item = _rows_of(columns[part.item], entities[1], items)
    seconds = columns[part.time].array(_seconds, np.int64)
    if not len(user):
        raise InputError(f"{events.name} has no events: name another file")
    if isinstance(part.rating, str):
        rating = columns[part.rating].array(partial(_rating, part.values), np.float32)
    else:
        rating = np.full(len(user), _rating({}, part.rating), np.float32)
    keep = _chosen(user, item, seconds, part.repeats, columns[part.user])
    return Dataset.from_events(
        mapping.name,
        records_pb2.FeatureSchema(features=features, history_length=history_length),
        entities[0],
        entities[1],
        user=user[keep],
        item=item[keep],
        rating=rating[keep],
        time=seconds[keep],
        positive_above=mapping.positive_above,
        shared_clock=part.shared_clock,
    )


def build_tables(
    work: Path,
    mapping: Path,
    events: Path,
    users: Path | None = None,
    items: Path | None = None,
    history_length: int = 30,
    *,
    split: Split | None = None,
) -> StageResult:
    """Run the stage `dataset`: check a log and write `work`/dataset; nothing is written where a check fails.

    The arguments and errors are those of `load_mapping` and `read_tables`; `split` is by users, fold 0, by default.
    """
    mapped = load_mapping(mapping)
    files = {"events": events, "users": users, "items": items}

    def make() -> tuple[Dataset, dict[str, Any]]:
        return read_tables(mapped, events, users, items, history_length=history_length), {"source": events.name}

    hashes = {name: file_sha256(file) for name, file in files.items() if file and file.is_file()}
    params = {"dataset": "table", "mapping": mapped.model_dump(mode="json"), "files": hashes}
    return write_dataset(work, make, split=split or Split(), history_length=history_length, params=params)
