"""Files of events and entities are checked whole, and what is known already is passed over."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.refresh.ingest import read_arrivals
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError
from kar_sidecar.store import EntityKey

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 22, tzinfo=UTC)
ANN = {"user": "ann", "item": "heat", "rating": 5.0, "time": 100}
FILM = {"entity": "item", "id": "salt", "title": "Salt and Lanterns", "features": {"year": 2026}}


def dataset() -> Dataset:
    feature = records_pb2.Feature(name="year", entity=ITEM.number, type=records_pb2.FEATURE_TYPE_NUMERIC)
    return Dataset.from_events(
        "tiny",
        records_pb2.FeatureSchema(features=[feature], history_length=2),
        [Entity("ann", {}, {})],
        [Entity("heat", {"year": 1995}, {"title": "Heat"}), Entity("ran", {}, {"title": "Ran"})],
        user=np.array([0, 0]),
        item=np.array([0, 1]),
        rating=np.array([5.0, 3.5], np.float32),
        time=np.array([100, 200]),
        positive_above=3,
    )


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(tmp_path: Path, *, events: tuple = (), entities: tuple = ()):
    return read_arrivals(
        dataset(),
        "title",
        events=write(tmp_path / "events.jsonl", *events),
        entities=write(tmp_path / "entities.jsonl", *entities),
        now=NOW,
    )


def test_what_is_new_extends_the_dataset(tmp_path: Path) -> None:
    arrivals = read(
        tmp_path,
        entities=(FILM, {"entity": "user", "id": "bob"}),
        events=(
            {"user": "bob", "item": "salt", "rating": 4.0, "time": 50},
            {"user": "cid", "item": "heat", "rating": 2.0, "time": 300},
            {"user": "ann", "item": "salt", "rating": 1.0, "time": 250},
        ),
    )
    grown = arrivals.dataset
    assert (arrivals.users, arrivals.items, arrivals.events) == (2, 1, 3)
    assert [user.id for user in grown.users] == ["ann", "bob", "cid"]
    assert grown.items[2] == Entity("salt", {"year": 2026}, {"title": "Salt and Lanterns"})
    assert grown.event_item.tolist() == [0, 1, 2, 2, 0]
    assert grown.event_rating.tolist() == [5, 3.5, 1, 4, 2]
    users = [EntityKey(USER, name) for name in ("ann", "bob", "cid")]
    assert arrivals.entities == {EntityKey(ITEM, "salt"), *users}


def test_what_is_known_is_passed_over_but_named(tmp_path: Path) -> None:
    known = {"entity": "item", "id": "heat", "title": "Heat", "features": {"year": 1995}}
    arrivals = read(tmp_path, events=(ANN, ANN, ""), entities=(known, known))
    assert (arrivals.users, arrivals.items, arrivals.events) == (0, 0, 0)
    assert len(arrivals.dataset.event_item) == 2
    assert arrivals.entities == {EntityKey(ITEM, "heat"), EntityKey(USER, "ann")}


def test_the_same_event_twice_in_a_file_is_one(tmp_path: Path) -> None:
    again = ANN | {"time": 300}
    assert read(tmp_path, events=(again, again)).events == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("rubbish", "line 2: Invalid JSON"),
        (ANN | {"rating": 11}, "line 2: rating: Input should be less than or equal to 10"),
        (ANN | {"rating": "5"}, "line 2: rating: Input should be a valid number"),
        (ANN | {"rating": 4.5}, "line 2: this event is known with the rating 5"),
        (ANN | {"item": "alien"}, "line 2: item 'alien' is not known: add it to --entities"),
        (ANN | {"time": 1_893_456_000}, "line 2: time: lies in the future"),
        (ANN | {"time": 1_500_000_000_000}, "line 2: time: Input should be less than or equal to 100000000000"),
        (ANN | {"stars": 4}, "line 2: stars: Extra inputs are not permitted"),
        (ANN | {"user": "a\nb"}, "line 2: user: Value error, holds a line break or NUL"),
    ],
)
def test_a_wrong_event_is_named_by_its_line(tmp_path: Path, line: object, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, events=(ANN, line))
    assert complaint in str(error.value)
    assert "nothing was changed" in str(error.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"entity": "film", "id": "x"}, "line 1: entity: Input should be 'item' or 'user'"),
        ({"entity": "item", "id": "x"}, "line 1: item 'x' has no fact 'title', which names it in prompts: add it"),
        (FILM | {"features": {"length": 90}}, "line 1: feature 'length' is not in the schema"),
        (FILM | {"features": {"year": "new"}}, "line 1: feature 'year' is numeric"),
        (FILM | {"id": "heat"}, "line 1: item 'heat' is known with other features or facts"),
        (FILM | {"facts": {"title": "Salt"}}, "line 1: Value error, has its title twice"),
    ],
)
def test_a_wrong_entity_is_named_by_its_line(tmp_path: Path, line: object, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, entities=(line,))
    assert complaint in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl is not a file"):
        read_arrivals(dataset(), "title", events=tmp_path / "gone.jsonl", now=NOW)
