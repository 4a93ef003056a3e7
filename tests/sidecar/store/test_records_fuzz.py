"""For any bytes of a store, the codec returns the value that was written or refuses; it never returns another value."""

import binascii
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IntegrityError
from kar_sidecar.features import FeatureLayout, History
from kar_sidecar.store.records import NEUTRAL, STALE, Header, decode_vectors, encode_vectors, read_header

pytestmark = pytest.mark.unit

EXAMPLES = settings(max_examples=60, deadline=None)
SPACE, OTHER = "0123456789ab", "ba9876543210"
NOW_MS = 1_000
DTYPES = {"float32": "<f", "float16": "<e"}
SCHEMA = records_pb2.FeatureSchema(
    features=[
        records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC),
        records_pb2.Feature(name="genres", entity=ITEM.number, type=records_pb2.FEATURE_TYPE_CATEGORICAL, width=2),
    ],
    history_length=3,
)
USERS, ITEMS = FeatureLayout(SCHEMA, USER), FeatureLayout(SCHEMA, ITEM)

int64 = st.integers(-(2**63), 2**63 - 1)
dtypes = st.sampled_from(sorted(DTYPES))
levels = st.sampled_from([1, 3])
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
ids = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
histories = st.lists(st.tuples(ids, finite32), max_size=5).map(
    lambda events: History(tuple(id_ for id_, _ in events), np.array([rating for _, rating in events], np.float32))
)
matrices = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite32)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, int]:
    """A way to damage bytes: the change, where (as a share of their length), and by how much."""
    return (
        draw(st.sampled_from(["flip", "cut", "insert", "swap"])),
        draw(st.integers(0, 2**16)),
        draw(st.integers(1, 255)),
    )


def damaged(blob: bytes, damage: tuple[str, int, int]) -> bytes:
    change, where, much = damage
    at = where % len(blob)
    if change == "cut":
        return blob[:at]
    if change == "insert":
        return blob[:at] + bytes([much]) + blob[at:]
    body = bytearray(blob)
    other = (at + much) % len(blob) if change == "swap" else at
    body[at], body[other] = (body[other], body[at]) if change == "swap" else (0, body[at] ^ much)
    return bytes(body)


def vectors(blob: bytes, dim: int, dtype: str = "float32") -> tuple[list[list[float]], list[int]]:
    batch = decode_vectors([blob], SPACE, dim, np.zeros(dim, np.float32), dtype=dtype, at_ms=NOW_MS)
    return batch.vectors.tolist(), batch.levels.tolist()


@EXAMPLES
@given(matrices, dtypes, st.integers(0, 2**48 - 1), levels, int64, int64)
def test_vectors_and_headers_come_back_bit_for_bit(
    matrix: np.ndarray, dtype: str, space: int, level: int, written_at_ms: int, expires_at_ms: int
) -> None:
    with np.errstate(over="ignore"):
        stored = matrix.astype(dtype)
    space_id = f"{space:012x}"
    blobs = encode_vectors(
        stored, space_id, dtype=dtype, level=level, written_at_ms=written_at_ms, expires_at_ms=expires_at_ms
    )
    dim = matrix.shape[1]
    batch = decode_vectors(blobs, space_id, dim, np.zeros(dim, np.float32), dtype=dtype, at_ms=NOW_MS)
    assert batch.vectors.tobytes() == stored.astype(np.float32).tobytes()
    stale = expires_at_ms != 0 and expires_at_ms <= NOW_MS
    assert batch.levels.tolist() == [STALE if stale else level] * len(matrix)
    assert {read_header(blob) for blob in blobs} == {Header(level, space, written_at_ms, expires_at_ms)}


@EXAMPLES
@given(finite32, histories, int64)
def test_users_and_their_histories_come_back(age: float, history: History, written_at_ms: int) -> None:
    blob = USERS.encode(USERS.row({"age": age}), written_at_ms=written_at_ms, history=history)
    user = USERS.decode_user(blob)
    assert user.history.item_ids == history.item_ids
    assert user.history.ratings.tobytes() == history.ratings.tobytes()
    assert (user.row.tobytes(), user.written_at_ms) == (USERS.row({"age": age}).tobytes(), written_at_ms)


@EXAMPLES
@given(st.lists(ids, max_size=2), int64)
def test_items_come_back(genres: list[str], written_at_ms: int) -> None:
    row = ITEMS.row({"genres": genres})
    assert ITEMS.decode_items([None, ITEMS.encode(row, written_at_ms=written_at_ms)])[1:].tobytes() == row.tobytes()


@EXAMPLES
@given(st.binary(max_size=120))
@example(b"")
@example(b"\0" * 32)
@example(Header(1, int(SPACE, 16), 0, 0).seal(b"\0" * 7))  # whole, but of no vector of two numbers
def test_random_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(IntegrityError):
        vectors(noise, 2)
    with pytest.raises(IntegrityError):
        ITEMS.decode_items([noise])
    with pytest.raises(IntegrityError):
        USERS.decode_user(noise)
    with suppress(IntegrityError):
        read_header(noise)


@EXAMPLES
@given(st.binary(max_size=60))
def test_a_sealed_body_of_any_bytes_is_read_or_refused(body: bytes) -> None:
    """The checksum is right, so only the form of the body can be wrong."""
    blob = Header(0, int(USERS.schema_hash, 16), 0, 0).seal(body)
    with suppress(IntegrityError):
        user = USERS.decode_user(blob)
        assert len(user.history.item_ids) == len(user.history.ratings)


@EXAMPLES
@given(matrices, dtypes, damages())
def test_a_damaged_vector_is_refused_or_the_same(matrix: np.ndarray, dtype: str, damage: tuple[str, int, int]) -> None:
    with np.errstate(over="ignore"):
        [blob] = encode_vectors(matrix[:1].astype(dtype), SPACE, dtype=dtype, written_at_ms=1)
    broken = damaged(blob, damage)
    if broken == blob:  # two equal bytes swapped
        return
    with pytest.raises(IntegrityError):
        vectors(broken, matrix.shape[1], dtype)
    with pytest.raises(IntegrityError):
        read_header(broken)


@EXAMPLES
@given(finite32, histories, damages())
def test_damaged_features_are_refused_or_the_same(age: float, history: History, damage: tuple[str, int, int]) -> None:
    user = USERS.encode(USERS.row({"age": age}), written_at_ms=1, history=history)
    item = ITEMS.encode(ITEMS.row({"genres": list(history.item_ids[:2])}), written_at_ms=1)
    for blob, decode in ((user, USERS.decode_user), (item, lambda blob: ITEMS.decode_items([blob]))):
        broken = damaged(blob, damage)
        if broken != blob:
            with pytest.raises(IntegrityError):
                decode(broken)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_no_single_bit_of_a_vector_may_flip(dtype: str) -> None:
    [blob] = encode_vectors(np.array([[1.5, -2]]), SPACE, dtype=dtype, written_at_ms=1, expires_at_ms=2)
    for bit in range(8 * len(blob)):
        broken = bytearray(blob)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            vectors(bytes(broken), 2, dtype)


def by_hand(
    blob: bytes | None, space: str, dim: int, dtype: str, neutral: list[float]
) -> tuple[tuple[float, ...], int] | None:
    """One vector and its level, read field by field; None for bytes to refuse."""
    if blob is None:
        return tuple(neutral), NEUTRAL
    size = struct.calcsize(DTYPES[dtype])
    if len(blob) != 32 + dim * size:
        return None
    magic, layout, level, crc, fingerprint, _, expires = struct.unpack("<HBBIQqq", blob[:32])
    if (magic, layout, fingerprint) != (0x4B41, 1, int(space, 16)) or crc != binascii.crc32(blob[:4] + blob[8:]):
        return None
    numbers = tuple(struct.unpack_from(DTYPES[dtype], blob, 32 + size * i)[0] for i in range(dim))
    return numbers, STALE if expires and expires <= NOW_MS else level


@EXAMPLES
@given(st.data(), dtypes, st.integers(1, 4))
def test_a_mixed_batch_decodes_as_its_records_do_one_by_one(data: st.DataObject, dtype: str, dim: int) -> None:
    number = st.floats(width=16, allow_nan=False, allow_infinity=False)
    expiry = st.sampled_from([0, 1, NOW_MS - 1, NOW_MS, NOW_MS + 1, 2**60])
    vector = st.lists(number, min_size=dim, max_size=dim)
    one = st.builds(
        lambda row, level, expires, space: encode_vectors(
            np.array([row]), space, dtype=dtype, level=level, written_at_ms=5, expires_at_ms=expires
        )[0],
        vector,
        levels,
        expiry,
        st.sampled_from([SPACE] * 9 + [OTHER]),
    )
    blobs = data.draw(st.lists(st.one_of(st.none(), one), max_size=8))
    neutral = data.draw(vector)
    expected = [by_hand(blob, SPACE, dim, dtype, neutral) for blob in blobs]
    arguments = (blobs, SPACE, dim, np.array(neutral, np.float32))
    if None in expected:
        with pytest.raises(IntegrityError):
            decode_vectors(*arguments, dtype=dtype, at_ms=NOW_MS)
        return
    batch = decode_vectors(*arguments, dtype=dtype, at_ms=NOW_MS)
    assert [(tuple(row), level) for row, level in zip(batch.vectors.tolist(), batch.levels.tolist(), strict=True)] == (
        expected
    )
