"""Expected tensors are worked out by hand from the world of tests/support/sidecar_world.py."""

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kar.ranking.v1.ranking_pb2 import Candidates, FeatureColumn, History, RankRequest, StringList, User
from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.ranking.affinity import affinity, affinity_columns
from kar_sidecar.ranking.assembly import assemble
from kar_sidecar.ranking.fetch import Fetched, entity_keys, rated_item_keys, view_user
from kar_sidecar.ranking.request import read_query
from kar_sidecar.scoring import ADAPTOR_INPUTS, BASE_INPUTS, KNOWLEDGE_INPUTS
from kar_sidecar.store import FEATURES, EntityKey, vector_part
from kar_sidecar.store.records import encode_vectors

pytestmark = pytest.mark.unit

FULL, STALE = records_pb2.KNOWLEDGE_LEVEL_FULL, records_pb2.KNOWLEDGE_LEVEL_STALE
NEIGHBOUR, NEUTRAL = records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR, records_pb2.KNOWLEDGE_LEVEL_NEUTRAL


def build(world, *, user="u1", items=("i1", "i2", "i3", "i4", "stranger"), arm="knowledge", mode="prestored", **more):
    served = world.served(mode)
    user_parts = {name: more.pop(name) for name in ("user_features", "history") if name in more}
    request = RankRequest(
        user=User(id=user, features=user_parts.get("user_features", ()), history=user_parts.get("history")),
        candidates=Candidates(ids=items, **more),
    )
    query = read_query(request, served, 100)
    records = world.store.read(entity_keys(query), served.parts(arm))
    user = view_user(query, served, records[0][0])
    rated = [record[0] for record in world.store.read(rated_item_keys(user.history, served), served.parts(arm)[-1:])]
    return assemble(query, served, Fetched(records, user, rated), at_ms=2)


def test_stored_values_become_the_tensors_of_the_backbone(world):
    assembly = build(world)
    expected = {
        "history_item": np.array([3, 1, 4]),  # the last three: i2, an unknown item, i3
        "history_rating": np.array([7, 2, 8]),
        "user_categorical": np.array([3]),  # "M"
        "user_numeric": np.array([2], np.float32),
        "item_index": np.array([2, 3, 4, 5, 1]),
        "item_categorical": np.array([[2, 3], [3, 0], [1, 0], [0, 0], [0, 0]]),
        "item_numeric": np.array([[1], [-1], [0], [0], [0]], np.float32),
        "user_knowledge": np.array([1, 1], np.float32),
        "item_knowledge": np.array([[2, 2], [3, 3], [4, 4], [0.25, 0.75], [0.25, 0.75]], np.float32),
    }
    assert assembly.tensors.keys() == set(BASE_INPUTS) | set(KNOWLEDGE_INPUTS) == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(assembly.tensors[name], values, strict=True, err_msg=name)
    assert assembly.user_level == FULL
    assert assembly.item_levels.tolist() == [FULL, NEIGHBOUR, STALE, NEUTRAL, NEUTRAL]
    assert assembly.history_events == 3
    assert assembly.missing_values == 3
    assert assembly.features_written_at_ms == 1_000_000
    assert not assembly.inline_history_used


def test_an_unknown_user_is_neutral_and_has_no_history(world):
    assembly = build(world, user="stranger")
    np.testing.assert_array_equal(assembly.tensors["user_knowledge"], [0.5, 0.5])
    np.testing.assert_array_equal(assembly.tensors["history_item"], [0, 0, 0])
    np.testing.assert_array_equal(assembly.tensors["user_categorical"], [0])
    assert (assembly.user_level, assembly.history_events, assembly.features_written_at_ms) == (NEUTRAL, 0, 0)


def test_the_control_arm_reads_no_vectors(world):
    assembly = build(world, arm="control")
    assert assembly.tensors.keys() == set(BASE_INPUTS)
    assert assembly.user_level == 0
    assert assembly.item_levels.tolist() == [0] * 5


def test_encoded_mode_sends_encodings_and_their_presence(world):
    tensors = build(world, user="u2", mode="encoded").tensors
    assert tensors.keys() == set(BASE_INPUTS) | set(ADAPTOR_INPUTS)
    np.testing.assert_array_equal(tensors["user_present"], np.array([False]), strict=True)
    np.testing.assert_array_equal(tensors["item_present"], [True, True, True, False, False])
    np.testing.assert_array_equal(tensors["user_encoding"], np.zeros(3, np.float32), strict=True)
    np.testing.assert_array_equal(
        tensors["item_encoding"], np.repeat(np.array([[2], [3], [4], [0], [0]], np.float32), 3, 1), strict=True
    )


def test_inline_values_replace_stored_ones_where_present(world):
    inline = [
        FeatureColumn(name="year", numbers=[2010, 0, 2000], present=[True, False, True]),
        FeatureColumn(name="genres", strings=[StringList(), StringList(values=["Action"]), StringList()]),
    ]
    age = [FeatureColumn(name="age", numbers=[20])]
    tensors = build(world, items=("i1", "i2", "i4"), features=inline, user_features=age).tensors
    np.testing.assert_array_equal(tensors["item_numeric"], [[2], [-1], [1]])
    np.testing.assert_array_equal(tensors["item_categorical"], [[0, 0], [2, 0], [0, 0]])
    np.testing.assert_array_equal(tensors["user_numeric"], [-1])
    np.testing.assert_array_equal(tensors["user_categorical"], [3])


def test_inline_values_do_not_reach_the_store(world):
    before = build(world).tensors["item_numeric"]
    build(world, items=("i1",), features=[FeatureColumn(name="year", numbers=[1])])
    np.testing.assert_array_equal(build(world).tensors["item_numeric"], before)


@pytest.mark.parametrize(
    ("as_of", "used"),
    [(None, True), (Timestamp(seconds=1001), True), (Timestamp(seconds=1000), True), (Timestamp(seconds=999), False)],
)
def test_the_newer_history_wins(world, as_of, used):
    assembly = build(world, history=History(item_ids=["i4"], ratings=[0.5], as_of=as_of))
    assert assembly.inline_history_used == used
    assert assembly.history_events == (1 if used else 3)
    np.testing.assert_array_equal(assembly.tensors["history_item"], [5, 0, 0] if used else [3, 1, 4])
    np.testing.assert_array_equal(assembly.tensors["history_rating"], [1, 0, 0] if used else [7, 2, 8])


def test_an_empty_inline_history_replaces_the_stored_one(world):
    assembly = build(world, history=History())
    assert assembly.inline_history_used
    assert assembly.history_events == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_missing_and_counted(world, value):
    column = [FeatureColumn(name="year", numbers=[value, 2000])]
    age = [FeatureColumn(name="age", numbers=[value])]
    assembly = build(world, items=("i1", "i2"), features=column, user_features=age)
    np.testing.assert_array_equal(assembly.tensors["item_numeric"], [[0], [1]])
    np.testing.assert_array_equal(assembly.tensors["user_numeric"], [0])
    assert assembly.missing_values == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["i1", "i2", "i3", "i4", "?"]), min_size=1, max_size=8),
    st.floats(width=32),
    st.lists(st.floats(width=32), max_size=5),
    st.sampled_from(["prestored", "encoded"]),
)
def test_a_row_depends_on_its_item_alone_and_is_finite(world, items, number, ratings, mode):
    assembly = build(
        world,
        items=items,
        mode=mode,
        user_features=[FeatureColumn(name="age", numbers=[number])],
        history=History(item_ids=["i1"] * len(ratings), ratings=ratings),
    )
    assert all(np.isfinite(values).all() for values in assembly.tensors.values())
    per_item = [name for name in assembly.tensors if name.startswith("item_")]
    for row, item in enumerate(items):
        alone = build(world, items=[item], mode=mode).tensors
        for name in per_item:
            np.testing.assert_array_equal(assembly.tensors[name][row], alone[name][0], err_msg=name)


def test_a_foreign_or_damaged_record_affects_only_its_own_entity(world):
    [foreign] = encode_vectors(np.zeros((1, 2), np.float32), "bbbbbbbbbbbb", written_at_ms=1)
    whole = build(world)
    assert whole.faults == ()
    for part, name, blank in zip(
        world.served().parts("knowledge"), ("item_numeric", "item_knowledge"), ([0], [0.25, 0.75]), strict=True
    ):
        before = world.store.read([EntityKey(ITEM, "i2")], [part])[0][0]
        world.store.write(part, [(EntityKey(ITEM, "i2"), foreign[:-1] if part == FEATURES else foreign)])
        assembly = build(world)
        assert "publish" in assembly.faults[0]
        expected = whole.tensors[name].copy()
        expected[1] = blank
        np.testing.assert_array_equal(assembly.tensors[name], expected)
        world.store.write(part, [(EntityKey(ITEM, "i2"), before)])


def test_a_damaged_user_record_counts_as_absent(world):
    world.store.write(FEATURES, [(EntityKey(USER, "u1"), b"short")])
    assembly, stranger = build(world), build(world, user="nobody")
    assert "publish" in assembly.faults[0]
    for name in ("history_item", "user_categorical", "user_numeric"):
        np.testing.assert_array_equal(assembly.tensors[name], stranger.tensors[name])
    np.testing.assert_array_equal(assembly.tensors["item_numeric"], build(world, user="u2").tensors["item_numeric"])


def test_affinity_of_the_last_rated_items(affine):
    # u1's last two events are an item without a vector, rated 1, and i3, rated 4.
    assembly = build(affine)
    assert "user_knowledge" not in assembly.tensors
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 0], [0, 0]], np.float32)
    past = np.array([[0, 0], [0.6, 0.8]], np.float32)
    expected = affinity(vectors[None], past[None], np.array([[1, 4]], np.float32), np.ones((1, 2), bool), [2])[0]
    np.testing.assert_allclose(assembly.tensors["affinity"], (expected - 1) / 2, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(assembly.tensors["item_vector"], vectors)
    np.testing.assert_array_equal(assembly.tensors["history_vector"], past)
    np.testing.assert_array_equal(assembly.tensors["history_weight"], [-1.5, 1.5])
    assert assembly.user_level == FULL
    assert assembly.item_levels.tolist() == [FULL, NEIGHBOUR, STALE, NEUTRAL, NEUTRAL]


def test_affinity_without_a_history_and_with_an_inline_history(affine):
    nobody = build(affine, user="nobody")
    assert nobody.user_level == NEUTRAL
    np.testing.assert_array_equal(nobody.tensors["affinity"], np.full((5, affinity_columns(1)), -0.5))
    assert not nobody.tensors["history_vector"].any()
    inline = build(affine, history=History(item_ids=["i1", "i2"], ratings=[5, 1]))
    np.testing.assert_array_equal(inline.tensors["history_vector"], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(inline.tensors["history_weight"], [2, -2])
    control = build(affine, arm="control")
    assert control.tensors.keys() == set(BASE_INPUTS)


def test_a_damaged_affinity_vector_counts_as_absent(affine):
    part = vector_part("cccccccccccc")
    affine.store.write(part, [(EntityKey(ITEM, "i3"), b"rubbish")])
    assembly = build(affine)
    assert assembly.faults
    assert assembly.user_level == NEUTRAL
    assert not assembly.tensors["item_vector"][2].any()
    assert np.isfinite(assembly.tensors["affinity"]).all()
