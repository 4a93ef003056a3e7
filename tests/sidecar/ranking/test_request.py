import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kar.ranking.v1.ranking_pb2 import Candidates, FeatureColumn, History, RankRequest, StringList, User
from kar_sidecar.errors import InputError
from kar_sidecar.features import hash_value
from kar_sidecar.ranking.request import read_query

pytestmark = pytest.mark.unit


def strings(*rows):
    return [StringList(values=row) for row in rows]


def test_a_whole_request_becomes_packed_columns(world):
    query = read_query(
        RankRequest(
            user=User(
                id="u1",
                features=[FeatureColumn(name="gender", strings=strings(["F"]))],
                history=History(item_ids=["i1"], ratings=[4.5], as_of=Timestamp(seconds=7)),
            ),
            candidates=Candidates(
                ids=["i1", "i2"],
                caller_scores=[0.5, 2],
                features=[
                    FeatureColumn(name="year", numbers=[1999, float("nan")], present=[True, False]),
                    FeatureColumn(name="genres", strings=strings(["Drama"], [])),
                ],
            ),
        ),
        world.served(),
        2,
    )
    assert (query.user_id, query.item_ids) == ("u1", ("i1", "i2"))
    np.testing.assert_array_equal(query.caller_scores, np.array([0.5, 2], np.float32))
    [gender] = query.user_columns
    np.testing.assert_array_equal(gender.values, [[hash_value("F")]])
    year, genres = query.item_columns
    np.testing.assert_array_equal(year.values, np.array([1999, np.nan], np.float32))
    np.testing.assert_array_equal(year.present, [True, False])
    np.testing.assert_array_equal(genres.values, np.array([[hash_value("Drama"), 0], [0, 0]], np.uint64))
    assert genres.present is None
    assert query.history.item_ids == ("i1",)
    assert query.history_as_of_ms == 7000


GOOD = {"user": User(id="u1"), "candidates": Candidates(ids=["i1", "i2"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": User()}, "user.id is empty"),
        ({"candidates": Candidates()}, "at least one candidate"),
        ({"candidates": Candidates(ids=["i1", "i2", "i3"])}, "3 candidates are more than 2"),
        ({"candidates": Candidates(ids=["i1", ""])}, r"candidates.ids\[1\] is empty"),
        ({"candidates": Candidates(ids=["i1", "i2"], caller_scores=[1])}, "1 caller_scores for 2 candidates"),
        ({"user": User(id="u1", history=History(item_ids=["i1"]))}, "1 items but 0 ratings"),
        ({"user": User(id="u1", history=History(item_ids=[""], ratings=[1]))}, "empty id"),
    ],
)
def test_malformed_requests_are_refused(world, change, message):
    with pytest.raises(InputError, match=message):
        read_query(RankRequest(**{**GOOD, **change}), world.served(), 2)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (FeatureColumn(name="colour", numbers=[1, 2]), "not in the schema .known: year, genres"),
        (FeatureColumn(name="year", numbers=[1]), "send exactly 2 numbers"),
        (FeatureColumn(name="year", strings=strings([], [])), "send exactly 2 numbers"),
        (FeatureColumn(name="year", numbers=[1, 2], strings=strings(["a"])), "send exactly 2 numbers"),
        (FeatureColumn(name="genres", numbers=[1, 2]), "send exactly 2 strings"),
        (FeatureColumn(name="genres", strings=strings(["a", "b", "c"], [])), "at most 2 values, not 3"),
        (FeatureColumn(name="year", numbers=[1, 2], present=[True]), "1 present flags: send 2"),
    ],
)
def test_malformed_columns_are_refused(world, column, message):
    request = RankRequest(**{**GOOD, "candidates": Candidates(ids=["i1", "i2"], features=[column])})
    with pytest.raises(InputError, match=message):
        read_query(request, world.served(), 2)


def test_a_user_has_one_row_and_only_its_own_features(world):
    for column in (FeatureColumn(name="age", numbers=[1, 2]), FeatureColumn(name="year", numbers=[1])):
        with pytest.raises(InputError, match="user feature"):
            read_query(RankRequest(**{**GOOD, "user": User(id="u1", features=[column])}), world.served(), 2)


def test_a_feature_sent_twice_is_refused(world):
    twice = [FeatureColumn(name="age", numbers=[1])] * 2
    with pytest.raises(InputError, match="sent twice"):
        read_query(RankRequest(**{**GOOD, "user": User(id="u1", features=twice)}), world.served(), 2)


lengths = st.integers(0, 6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths, lengths, lengths, lengths, lengths, lengths, lengths)
def test_a_request_is_accepted_exactly_if_all_columns_are_aligned(
    world, items, scores, years, genres, present, events, ratings
):
    request = RankRequest(
        user=User(id="u1", history=History(item_ids=["i1"] * events, ratings=[3] * ratings)),
        candidates=Candidates(
            ids=["i1"] * items,
            caller_scores=[1] * scores,
            features=[
                FeatureColumn(name="year", numbers=[1] * years, present=[True] * present),
                FeatureColumn(name="genres", strings=strings(*[["Drama"]] * genres)),
            ],
        ),
    )
    aligned = (
        1 <= items <= 5 and scores in (0, items) and years == genres == items and present in (0, items)
    ) and events == ratings
    if aligned:
        query = read_query(request, world.served(), 5)
        assert [len(column.values) for column in query.item_columns] == [items, items]
    else:
        with pytest.raises(InputError, match=r"^\S.*\S$"):
            read_query(request, world.served(), 5)
