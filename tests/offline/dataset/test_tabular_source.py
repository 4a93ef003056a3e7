import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import typer
from pyarrow import csv, parquet
from typer.testing import CliRunner

from kar_offline.dataset.command import dataset as dataset_command
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.mapping import load_mapping
from kar_offline.dataset.stage import build_dataset
from kar_offline.dataset.tabular_source import TabularSource, read_tables
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, NotFoundError
from kar_sidecar.features import FeatureLayout

pytestmark = pytest.mark.unit

EVENTS = {
    "who": ["bo", "al", "al", "bo"],
    "sku": [20, 7, 20, 3],
    "at": [1704067205, 1704067200, 1704067202, 1704067201],
    "stars": [5.0, 2.0, 4.5, 1.0],
}
USERS = {"who": ["bo", "al"], "age": [None, 41.0], "town": ["Bonn", None], "secret": ["x", "y"]}
ITEMS = {
    "sku": [20, 3, 7],
    "label": ["Heat (1995)", "Ran", "Alien, again"],
    "tags": ["crime|drama", "", "space"],
    "price": [9.5, 3.0, None],
}
MAPPING = """
name = "shop"
positive_above = 3.5
[events]
user = "who"
item = "sku"
time = "at"
rating = "stars"
"""
TABLES = """
[users]
id = "who"
features = { age = "numeric", town = "categorical" }
facts = ["town"]
[items]
id = "sku"
title = "label"
features = { tags = { separator = "|" }, price = "numeric" }
facts = ["tags"]
"""


def write(path: Path, columns: dict) -> Path:
    (parquet.write_table if path.suffix == ".parquet" else csv.write_csv)(pa.table(columns), path)
    return path


def mapping(folder: Path, text: str = MAPPING) -> Path:
    (folder / "mapping.toml").write_text(text)
    return folder / "mapping.toml"


def read(
    folder: Path, events: dict, text: str = MAPPING, users: dict | None = None, items: dict | None = None
) -> Dataset:
    tables = {"events": events, "users": users, "items": items}
    files = [columns and write(folder / f"{name}.csv", columns) for name, columns in tables.items()]
    return read_tables(load_mapping(mapping(folder, text)), *files, history_length=9)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_become_sorted_events_and_entities(tmp_path: Path, suffix: str) -> None:
    columns = {"events": EVENTS, "users": USERS, "items": ITEMS}
    files = [write(tmp_path / f"{name}.{suffix}", table) for name, table in columns.items()]
    dataset = read_tables(load_mapping(mapping(tmp_path, MAPPING + TABLES)), *files, history_length=9)
    assert [user.id for user in dataset.users] == ["al", "bo"]
    assert [item.id for item in dataset.items] == ["20", "3", "7"]
    assert [user.features for user in dataset.users] == [{"age": 41.0, "town": None}, {"age": None, "town": "Bonn"}]
    assert [user.facts for user in dataset.users] == [{"town": None}, {"town": "Bonn"}]
    assert dataset.items[0].features == {"tags": ["crime", "drama"], "price": 9.5}
    assert dataset.items[0].facts == {"title": "Heat (1995)", "tags": ["crime", "drama"]}
    assert dataset.items[1].features == {"tags": [], "price": 3.0}
    # al: 7 then 20; bo: 3 then 20. Item rows: 20, 3, 7.
    assert dataset.event_user.tolist() == [0, 0, 1, 1]
    assert dataset.event_item.tolist() == [2, 0, 1, 0]
    assert dataset.event_rating.tolist() == [2.0, 4.5, 1.0, 5.0]
    assert dataset.event_time.tolist() == [1704067200, 1704067202, 1704067201, 1704067205]
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    assert [(f.name, f.entity, f.width) for f in dataset.schema.features] == [
        ("age", USER.number, 0),
        ("town", USER.number, 1),
        ("tags", ITEM.number, 2),
        ("price", ITEM.number, 0),
    ]
    assert (dataset.name, dataset.schema.history_length, dataset.shared_clock) == ("shop", 9, True)
    for kind, entities in ((USER, dataset.users), (ITEM, dataset.items)):
        for entity in entities:
            assert FeatureLayout(dataset.schema, kind).row(entity.features).shape == (1,)


def test_csv_and_parquet_are_stored_alike(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        columns = {"events": EVENTS, "users": USERS, "items": ITEMS}
        files = [write(tmp_path / f"{name}.{suffix}", table) for name, table in columns.items()]
        source = TabularSource(load_mapping(mapping(tmp_path, MAPPING + TABLES)), *files)
        build_dataset(WorkFolder(tmp_path / suffix), source)
    for file in ("dataset.json", "users.jsonl", "items.jsonl", "events.npz"):
        one, other = ((tmp_path / suffix / "dataset" / file).read_bytes() for suffix in ("csv", "parquet"))
        assert one == other or file == "events.npz"
    one, other = (Dataset.load(tmp_path / suffix / "dataset") for suffix in ("csv", "parquet"))
    np.testing.assert_array_equal(one.event_time, other.event_time)
    np.testing.assert_array_equal(one.event_rating, other.event_rating)
    np.testing.assert_array_equal(one.event_item, other.event_item)


@pytest.mark.parametrize(
    "times",
    [
        ["1704067205", "1704067200", "1704067202", "1704067201"],
        ["2024-01-01T00:00:05Z", "2024-01-01 00:00:00", "2024-01-01T01:00:02+01:00", "2024-01-01T00:00:01.9"],
        [datetime(2024, 1, 1, 0, 0, second, 7000, tzinfo=UTC) for second in (5, 0, 2, 1)],
        [datetime(2024, 1, 1, 0, 0, second) for second in (5, 0, 2, 1)],
    ],
)
def test_times_may_be_seconds_or_iso_or_arrow_timestamps(tmp_path: Path, times: list) -> None:
    file = write(tmp_path / "events.parquet", {**EVENTS, "at": times})
    dataset = read_tables(load_mapping(mapping(tmp_path)), file, history_length=1)
    assert dataset.event_time.tolist() == [1704067200, 1704067202, 1704067201, 1704067205]


def test_without_tables_the_ids_of_the_events_are_all_there_is(tmp_path: Path) -> None:
    dataset = read(tmp_path, EVENTS)
    assert [(item.id, item.features, item.facts) for item in dataset.items] == [(i, {}, {}) for i in ("20", "3", "7")]
    assert [user.id for user in dataset.users] == ["al", "bo"]


def test_kinds_of_events_and_a_constant_can_stand_for_ratings(tmp_path: Path) -> None:
    kinds = {**EVENTS, "stars": ["buy", "view", "buy", "view"]}
    dataset = read(tmp_path, kinds, MAPPING + "values = { view = 1, buy = 5 }\n")
    assert dataset.event_rating.tolist() == [1, 5, 1, 5]
    with pytest.raises(InputError, match=r"events.csv row 2: stars 'view' is none of buy"):
        read(tmp_path, kinds, MAPPING + "values = { buy = 5 }\n")
    assert read(tmp_path, EVENTS, MAPPING.replace('"stars"', "4")).event_rating.tolist() == [4, 4, 4, 4]


def changed(column: str, row: int, value: object) -> dict:
    values = [str(v) for v in EVENTS[column]]
    return {**EVENTS, column: [*values[:row], value, *values[row + 1 :]]}


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (changed("at", 3, "yesterday"), r"events.csv row 4: at 'yesterday' is not a timestamp: give seconds"),
        (changed("at", 2, "1704067202000"), r"row 3: at '1704067202000' is too great for seconds"),
        (changed("stars", 1, "nan"), r"row 2: stars 'nan' is not a number"),
        (changed("stars", 1, ""), r"row 2: stars '' is not a number"),
        (changed("stars", 0, "99"), r"row 1: stars '99' is not between 0 and 10: scale the ratings"),
        (changed("who", 1, " "), r"row 2: who ' ' is empty"),
        (changed("sku", 3, "a\0b"), r"row 4: sku 'a\\x00b' holds a NUL or a line break"),
        (changed("sku", 2, "a\nb"), r"row 3: sku 'a\\nb' holds a NUL or a line break"),
        ({**EVENTS, "who": ["al", "bo", "al", "bo"]}, r"row 3: who and its item repeat the pair of row 1"),
        ({name: values[:0] for name, values in EVENTS.items()}, r"events.csv has no events"),
        ({"who": ["a"]}, r"events.csv needs exactly one column 'sku' \(its columns: who\): correct \[events\]"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, events: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, events)


def test_places_of_great_files_are_counted_with_commas(tmp_path: Path) -> None:
    n = 1500
    events = {"who": [f"u{i}" for i in range(n)], "sku": ["x"] * n, "at": ["5"] * n, "stars": ["1"] * n}
    events["at"][1203] = "yesterday"
    with pytest.raises(InputError, match=r"events.csv row 1,204: at 'yesterday' is not a timestamp"):
        read(tmp_path, events)


@pytest.mark.parametrize(
    ("users", "items", "words"),
    [
        ({**USERS, "who": ["bo", "xi"]}, ITEMS, r"events.csv row 2: who 'al' is not in users.csv"),
        (USERS, {**ITEMS, "sku": [20, 3, 8]}, r"events.csv row 2: sku '7' is not in items.csv"),
        (USERS, {**ITEMS, "sku": [20, 3, 20]}, r"items.csv row 3: sku '20' was in row 1 already"),
        (USERS, {**ITEMS, "sku": ["20", "", "7"]}, r"items.csv row 2: sku '' is empty"),
        (USERS, {**ITEMS, "label": ["a", "", "b"]}, r"items.csv row 2: label '' is empty: give it a title"),
        ({**USERS, "age": ["old", "41"]}, ITEMS, r"users.csv row 1: age 'old' is not a number"),
        (USERS, {**ITEMS, "tags": ["a", "b|" * 65, "c"]}, r"items.csv row 2: tags .* has 65 values: keep at most 64"),
        (None, ITEMS, r"--users and \[users\] of the mapping belong together"),
    ],
)
def test_tables_of_users_and_items_are_checked(tmp_path: Path, users: dict | None, items: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, EVENTS, MAPPING + TABLES, users, items)


def test_values_of_parquet_that_are_missing_or_no_ids_are_named(tmp_path: Path) -> None:
    for who, words in (
        (["bo", None, "al", "bo"], "row 2: who is empty"),
        ([1.5, 2.0, 3.0, 4.0], "row 1: who 1.5 is no"),
    ):
        file = write(tmp_path / "events.parquet", {**EVENTS, "who": who})
        with pytest.raises(InputError, match=words):
            read_tables(load_mapping(mapping(tmp_path)), file, history_length=1)


def test_lists_and_categories_of_parquet_are_read(tmp_path: Path) -> None:
    tags = pa.array([["crime", "drama"], [], None])
    items = write(tmp_path / "items.parquet", {**ITEMS, "tags": tags})
    users = write(tmp_path / "users.parquet", {**USERS, "town": pa.array(USERS["town"]).dictionary_encode()})
    events = write(tmp_path / "events.parquet", EVENTS)
    dataset = read_tables(load_mapping(mapping(tmp_path, MAPPING + TABLES)), events, users, items, history_length=1)
    assert [item.features["tags"] for item in dataset.items] == [["crime", "drama"], [], []]
    assert [user.features["town"] for user in dataset.users] == [None, "Bonn"]


@pytest.mark.parametrize(("rule", "rating", "time"), [("first", 2.0, 10), ("last", 4.0, 30)])
def test_of_repeated_events_the_first_or_the_last_can_count(
    tmp_path: Path, rule: str, rating: float, time: int
) -> None:
    events = {"who": ["a"] * 4, "sku": ["x", "x", "y", "x"], "at": [20, 30, 5, 10], "stars": [3, 4, 1, 2]}
    dataset = read(tmp_path, events, MAPPING + f'repeats = "{rule}"\n')
    assert dataset.event_rating.tolist() == [1.0, rating]
    assert dataset.event_time.tolist() == [5, time]


def test_other_delimiters_and_private_clocks(tmp_path: Path) -> None:
    (tmp_path / "events.tsv").write_text("who\tsku\tat\tstars\na\tx\t0\t5\na\ty\t1\t4\n")
    text = 'delimiter = "\\t"' + MAPPING + "shared_clock = false\n"
    dataset = read_tables(load_mapping(mapping(tmp_path, text)), tmp_path / "events.tsv", history_length=1)
    assert (dataset.event_time.tolist(), dataset.shared_clock) == ([0, 1], False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"who,sku,at,stars\na,x,1,5\na,y,2\n", "Expected 4 columns, got 3"),
        (b"who,sku,at,stars\n\xff,x,1,5\n", "UTF8"),
        (b"", "cannot be read as a table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "events.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_tables(load_mapping(mapping(tmp_path)), tmp_path / "events.csv", history_length=1)


def test_a_mapping_is_checked(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"other\.toml does not exist"):
        load_mapping(tmp_path / "other.toml")
    with pytest.raises(InputError, match="is not TOML"):
        load_mapping(mapping(tmp_path, "name ="))
    with pytest.raises(InputError, match=r"events\.clock: Extra inputs are not permitted"):
        load_mapping(mapping(tmp_path, MAPPING + "clock = 3\n"))
    with pytest.raises(InputError, match=r"events\.rating.*less than or equal to 10"):
        load_mapping(mapping(tmp_path, re.sub(r"rating = .*", "rating = 20", MAPPING, count=1)))
    with pytest.raises(InputError, match="'n' and the fact 'title' would both be the title"):
        load_mapping(mapping(tmp_path, MAPPING + '[items]\nid = "i"\ntitle = "n"\nfacts = ["title"]\n'))


def test_the_command_builds_once_and_leaves_nothing_behind_on_errors(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(dataset_command)
    events, work = write(tmp_path / "events.csv", EVENTS), WorkFolder(tmp_path / "work")
    args = ["--events", str(events), "--mapping", str(mapping(tmp_path)), "--work", str(work)]
    assert "written" in CliRunner().invoke(app, args).output
    assert "up to date" in " ".join(CliRunner().invoke(app, args).output.split())
    before = (work.dataset / "events.npz").read_bytes()
    write(events, changed("at", 0, "never"))
    assert isinstance(CliRunner().invoke(app, args).exception, InputError)
    assert (work.dataset / "events.npz").read_bytes() == before
    write(events, EVENTS)
    assert "up to date" in " ".join(CliRunner().invoke(app, args).output.split())
    assert isinstance(CliRunner().invoke(app, args[:2]).exception, InputError)
    assert "leave them out with --events" in str(CliRunner().invoke(app, [*args, "--limit", "3"]).exception)
