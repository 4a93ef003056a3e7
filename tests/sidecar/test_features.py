"""Features survive packing, storing and encoding; wrong values and records are refused."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, IntegrityError
from kar_sidecar.features import (
    PADDING,
    RESERVED,
    UNKNOWN,
    FeatureEncoder,
    FeatureLayout,
    History,
    hash_value,
    rating_bucket,
    schema_hash,
)

pytestmark = pytest.mark.unit

NUMERIC, CATEGORICAL = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL


def feature(name: str, entity: int, width: int = 0) -> records_pb2.Feature:
    kind = CATEGORICAL if width else NUMERIC
    return records_pb2.Feature(name=name, entity=entity, type=kind, width=width)


SCHEMA = records_pb2.FeatureSchema(
    features=[
        feature("age", USER.number),
        feature("gender", USER.number, 1),
        feature("year", ITEM.number),
        feature("genres", ITEM.number, 3),
    ],
    history_length=4,
)
USERS, ITEMS = FeatureLayout(SCHEMA, USER), FeatureLayout(SCHEMA, ITEM)
NO_HISTORY = History((), np.zeros(0, np.float32))


def history(**ratings: float) -> History:
    return History(tuple(ratings), np.array(list(ratings.values()), np.float32))


def encoder(item_ids: tuple[str, ...] = ("heat", "alien")) -> FeatureEncoder:
    encodings = [
        records_pb2.FeatureEncoding(name="age", entity=USER.number, mean=30, scale=10),
        records_pb2.FeatureEncoding(name="gender", entity=USER.number, vocabulary=["F", "M"]),
        records_pb2.FeatureEncoding(name="year", entity=ITEM.number, mean=1990, scale=5),
        records_pb2.FeatureEncoding(name="genres", entity=ITEM.number, vocabulary=["Action", "Crime", "Drama"]),
    ]
    return FeatureEncoder(SCHEMA, encodings, item_ids)


@pytest.mark.parametrize("value", ["", "Drama", "七人の侍"])
def test_categories_are_hashed_with_blake2b(value: str) -> None:
    digest = hashlib.blake2b(value.encode("utf-8"), digest_size=8).digest()
    assert hash_value(value) == int.from_bytes(digest, "little") != 0


def test_the_schema_hash_covers_names_types_widths_and_length() -> None:
    hashes = {schema_hash(SCHEMA)}
    for change in ("age", "gender", "width", "history_length"):
        other = records_pb2.FeatureSchema()
        other.CopyFrom(SCHEMA)
        if change == "age":
            other.features[0].name = "years"
        elif change == "gender":
            other.features[1].entity = ITEM.number
        elif change == "width":
            other.features[3].width = 4
        else:
            other.history_length = 5
        hashes.add(schema_hash(other))
    assert len(hashes) == 5
    assert all(len(text) == 16 for text in hashes)


def test_ratings_have_half_star_buckets() -> None:
    ratings = np.array([0.5, 1, 3.5, 5, 10, 0, -3, 99, np.nan, np.inf, -np.inf], np.float32)
    assert rating_bucket(ratings).tolist() == [1, 2, 7, 10, 20, 1, 1, 20, 1, 20, 1]


texts = st.text(max_size=8)
ids = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)
floats = st.floats(width=32, allow_nan=True, allow_infinity=False)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[FeatureLayout, dict[str, Any]]:
    """A layout of any features of one kind, and values for some of them."""
    names = draw(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), unique=True, max_size=5))
    features = [feature(name, USER.number, draw(st.integers(0, 4))) for name in names]
    values: dict[str, Any] = {}
    for item in features:
        if draw(st.booleans()):
            several = st.lists(texts, max_size=item.width)
            values[item.name] = draw(several if item.width else floats)
    return FeatureLayout(records_pb2.FeatureSchema(features=features), USER), values


@given(
    layouts(),
    st.lists(st.tuples(ids, st.floats(width=32, allow_nan=False)), max_size=8),
    st.integers(-(2**62), 2**62),
)
def test_a_user_record_gives_back_what_was_packed(
    packed: tuple[FeatureLayout, dict[str, Any]], events: list[tuple[str, float]], written_at_ms: int
) -> None:
    layout, values = packed
    past = History(tuple(item for item, _ in events), np.array([rating for _, rating in events], np.float32))
    blob = layout.encode(layout.row(values), written_at_ms=written_at_ms, history=past)
    read = layout.decode_user(blob)
    assert (read.history.item_ids, read.history.ratings.tolist()) == (past.item_ids, past.ratings.tolist())
    assert read.written_at_ms == written_at_ms
    for item in layout.features:
        column = read.row[item.name][0]
        if item.type == NUMERIC:
            expected = np.float32(values.get(item.name, np.nan))
            if np.isnan(expected):
                assert np.isnan(column)  # any NaN: its sign means nothing
            else:
                assert np.float32(column).tobytes() == expected.tobytes()
        else:
            hashes = [hash_value(text) for text in values.get(item.name, [])]
            assert column.tolist() == hashes + [0] * (item.width - len(hashes))


@given(layouts(), st.lists(st.booleans(), max_size=6))
def test_item_records_keep_their_order_and_absent_ones_are_missing(
    packed: tuple[FeatureLayout, dict[str, Any]], present: list[bool]
) -> None:
    layout, values = packed
    row = layout.row(values)
    blob = layout.encode(row, written_at_ms=1)
    rows = layout.decode_items([blob if here else None for here in present])
    assert [decoded.tobytes() for decoded in rows] == [
        (row if is_present else layout.missing).tobytes() for is_present in present
    ]


def test_an_absent_user_has_neither_features_nor_history() -> None:
    read = USERS.decode_user(None)
    assert (read.history.item_ids, len(read.history.ratings), read.written_at_ms) == ((), 0, 0)
    assert math.isnan(read.row["age"][0])
    assert read.row["gender"].tolist() == [[0]]


def test_one_category_may_be_a_plain_string() -> None:
    assert USERS.row({"gender": "F"}).tobytes() == USERS.row({"gender": ["F"]}).tobytes()


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 1e300, -(10**400), 10**400])
def test_a_number_that_float32_cannot_hold_is_missing(value: float | None) -> None:
    _, numbers, missing = encoder().rows(USERS, USERS.row({"age": value}))
    assert (numbers.tolist(), missing) == ([[0.0]], 1)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"salary": 1}, "'salary' is not in the schema (known: age, gender): remove it"),
        ({"age": "24"}, "'age' is numeric: send a number"),
        ({"age": True}, "'age' is numeric"),
        ({"gender": 1}, "'gender' is categorical: send strings"),
        ({"gender": [1]}, "'gender' is categorical"),
        ({"gender": ["F", "M"]}, "'gender' takes at most 1 values, not 2"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError) as raised:
        USERS.row(values)
    assert complaint in str(raised.value)


def test_misaligned_and_unstorable_histories_are_refused() -> None:
    with pytest.raises(InputError, match="2 items but 1 ratings"):
        History(("a", "b"), np.ones(1, np.float32))
    with pytest.raises(InputError, match="NUL"):
        History(("a\0b",), np.ones(1, np.float32))


def test_records_of_another_schema_are_refused() -> None:
    other = FeatureLayout(records_pb2.FeatureSchema(features=SCHEMA.features, history_length=9), USER)
    items = FeatureLayout(records_pb2.FeatureSchema(features=SCHEMA.features, history_length=9), ITEM)
    with pytest.raises(IntegrityError, match="another schema"):
        USERS.decode_user(other.encode(other.missing, written_at_ms=1, history=NO_HISTORY))
    with pytest.raises(IntegrityError, match="another schema"):
        ITEMS.decode_items([items.encode(items.missing, written_at_ms=1)])


def test_an_item_record_is_refused_as_a_user_record() -> None:
    with pytest.raises(IntegrityError, match="corrupt"):
        USERS.decode_user(USERS.encode(USERS.missing, written_at_ms=1))
    with pytest.raises(IntegrityError, match="wrong size"):
        ITEMS.decode_items([ITEMS.encode(ITEMS.missing, written_at_ms=1, history=NO_HISTORY)])


@given(st.data())
def test_a_record_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    user = USERS.encode(USERS.row({"age": 24}), written_at_ms=1, history=history(heat=4, alien=5))
    item = ITEMS.encode(ITEMS.missing, written_at_ms=1)
    for blob, decode in ((user, USERS.decode_user), (item, lambda damaged: ITEMS.decode_items([damaged]))):
        damaged = bytearray(blob)
        damaged[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
        with pytest.raises(IntegrityError):
            decode(bytes(damaged))


@pytest.mark.parametrize("size", [0, 31, 32, 40, -1])
def test_a_cut_record_is_refused(size: int) -> None:
    blob = USERS.encode(USERS.missing, written_at_ms=1, history=history(heat=4))
    with pytest.raises(IntegrityError):
        USERS.decode_user(blob[:size])


def test_rows_become_indices_and_standardised_numbers() -> None:
    rows = np.concatenate([ITEMS.row({"year": 2000, "genres": ["Drama", "Western"]}), ITEMS.missing])
    categories, numbers, missing = encoder().rows(ITEMS, rows)
    assert categories.tolist() == [[RESERVED + 2, UNKNOWN, PADDING], [PADDING, PADDING, PADDING]]
    assert numbers.tolist() == [[2.0], [0.0]]  # (2000 - 1990) / 5
    assert missing == 1
    assert (categories.dtype, numbers.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize(
    ("year", "standard", "missing"),
    [(2010, 4.0, 0), (2040, 10.0, 0), (1e6, 10.0, 0), (-1e6, -10.0, 0), (1e30, 0.0, 1), (float("inf"), 0.0, 1)],
)
def test_standardised_numbers_are_bounded(year: float, standard: float, missing: int) -> None:
    _, numbers, absent = encoder().rows(ITEMS, ITEMS.row({"year": year}))
    assert (numbers.tolist(), absent) == ([[standard]], missing)


@given(st.sets(texts, max_size=20), st.lists(texts, max_size=20))
def test_vocabulary_positions_are_indices(vocabulary: set[str], values: list[str]) -> None:
    known = sorted(vocabulary)
    schema = records_pb2.FeatureSchema(features=[feature("tag", ITEM.number, 1)])
    layout = FeatureLayout(schema, ITEM)
    encodings = [records_pb2.FeatureEncoding(name="tag", entity=ITEM.number, vocabulary=known)]
    rows = np.concatenate([layout.missing, *(layout.row({"tag": value}) for value in values)])
    categories, numbers, missing = FeatureEncoder(schema, encodings, []).rows(layout, rows)
    expected = [known.index(value) + RESERVED if value in vocabulary else UNKNOWN for value in values]
    assert categories[:, 0].tolist() == [PADDING, *expected]
    assert (numbers.tolist(), missing) == ([[0.0]] * len(rows), 0)


def test_a_kind_without_features_has_constant_columns() -> None:
    schema = records_pb2.FeatureSchema(features=[feature("year", ITEM.number)])
    layout = FeatureLayout(schema, USER)
    categories, numbers, missing = FeatureEncoder(schema, [], []).rows(layout, layout.missing)
    assert (categories.tolist(), numbers.tolist(), missing) == ([[0]], [[0.0]], 0)


def test_items_that_training_never_saw_are_unknown() -> None:
    assert encoder().items(["alien", "?", "heat"]).tolist() == [RESERVED + 1, UNKNOWN, RESERVED]


def test_the_last_events_of_a_history_are_read_and_the_rest_padded() -> None:
    items, ratings = encoder().history(history(a=1, heat=2, b=3, alien=4, c=5))
    assert items.tolist() == [RESERVED, UNKNOWN, RESERVED + 1, UNKNOWN]
    assert ratings.tolist() == [4, 6, 8, 10]
    items, ratings = encoder().history(history(heat=2.5))
    assert (items.tolist(), ratings.tolist()) == ([RESERVED, 0, 0, 0], [5, 0, 0, 0])
    items, ratings = encoder().history(NO_HISTORY)
    assert (items.tolist(), ratings.tolist()) == ([0] * 4, [0] * 4)
