import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.check.facts import FactsTable, Film
from kar_offline.check.gate_context import subjects
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts.scenario import load_scenario

pytestmark = pytest.mark.unit

ITEMS = (
    Entity("1", {"year": 1995}, {"title": "Heat (1995)", "genres": ["Action"]}),
    Entity("2", {"year": 1988}, {"title": "Big (1988)"}),
    Entity("3", {}, {"title": "Usual Suspects, The (1995)"}),
    Entity("4", {}, {"title": "Star Trek: The Wrath of Khan (1982)", "directors": ["Nicholas Meyer"]}),
    Entity("5", {}, {}),
)
USERS = (
    Entity("7", {}, {"age": 24, "name": "Ann Berg", "zip": "94043", "note": "", "gender": None}),
    Entity("8", {}, {}),
    Entity("9", {}, {}),
)
TABLE = FactsTable.of("made", [Film("Heat", 1996, ("Michael Mann",), ("Crime", "Drama"), ("Al Pacino",))])


@pytest.fixture
def dataset() -> Dataset:
    """User 7 rated items 1 to 4 in that order, the first two before the cut-off; user 8 one item; user 9 none."""
    return Dataset.from_events(
        "tiny",
        records_pb2.FeatureSchema(),
        USERS,
        ITEMS,
        user=np.array([0, 0, 0, 0, 1]),
        item=np.array([0, 1, 2, 3, 0]),
        rating=np.ones(5, np.float32),
        time=np.array([1, 2, 3, 4, 1]),
        positive_above=3.0,
    )


def test_items_have_their_names_people_and_facts(dataset: Dataset) -> None:
    known = subjects(dataset, load_scenario("movies"), TABLE)
    heat = known["item", "1"]
    assert (heat.entity, heat.id, heat.titles, heat.years) == ("item", "1", {"heat"}, (1995, 1996))
    assert heat.names.forms == {"heat", "michael mann", "al pacino"}
    assert (heat.directors, heat.cast) == (("Michael Mann",), ("Al Pacino",))
    assert heat.genres == {"Action", "Crime", "Drama"}
    suspects = known["item", "3"]
    assert suspects.titles == suspects.names.forms == {"the usual suspects", "usual suspects"}
    assert (suspects.years, suspects.genres, suspects.directors) == ((1995,), frozenset(), ())
    khan = known["item", "4"]
    assert khan.titles == {"star trek the wrath of khan", "star trek", "the wrath of khan"}
    assert khan.directors == ("Nicholas Meyer",)
    assert known["item", "5"].names.forms == frozenset()


def test_users_have_what_was_shown_and_what_came_later(dataset: Dataset) -> None:
    known = subjects(dataset, load_scenario("movies"))
    ann = known["user", "7"]
    assert ann.titles == {"heat", "big"}
    assert ann.later == {"the usual suspects", "usual suspects", "star trek the wrath of khan"}
    assert ann.withheld == {"name": "Ann Berg", "zip": "94043"}
    assert ann.names is known["user", "8"].names
    assert known["user", "8"].titles == {"heat"}
    assert known["user", "9"].titles == known["user", "9"].later == frozenset()
    assert len(known) == len(ITEMS) + len(USERS)


def test_an_item_seen_again_is_not_later(dataset: Dataset) -> None:
    twins = Dataset.from_events(
        "tiny",
        records_pb2.FeatureSchema(),
        USERS[:1],
        [*ITEMS[:1], Entity("6", {}, {"title": "Heat (1995)"})],
        user=np.array([0, 0]),
        item=np.array([0, 1]),
        rating=np.ones(2, np.float32),
        time=np.array([1, 2]),
        positive_above=3.0,
    )
    assert subjects(twins, load_scenario("movies"))["user", "7"].later == frozenset()
