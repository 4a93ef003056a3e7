"""The bytes of a part follow the layout, and other bytes are refused."""

import binascii
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kar_sidecar.entities import ITEM
from kar_sidecar.errors import IntegrityError
from kar_sidecar.store import EntityKey
from kar_sidecar.store.records import (
    FULL,
    NEUTRAL,
    STALE,
    Header,
    decode_vectors,
    encode_vectors,
    in_batches,
    is_newer,
    read_header,
)

pytestmark = pytest.mark.unit

SPACE = "0123456789ab"
NEUTRAL_VECTOR = np.array([9, 9], np.float32)


def part(level: int, fingerprint: int, written_at_ms: int, expires_at_ms: int, payload: bytes) -> bytes:
    """A part, written by hand."""
    front = struct.pack("<HBB", 0x4B41, 1, level)
    back = struct.pack("<Qqq", fingerprint, written_at_ms, expires_at_ms) + payload
    return front + struct.pack("<I", binascii.crc32(front + back)) + back


def test_a_part_is_32_little_endian_bytes_and_its_payload() -> None:
    header = Header(level=1, fingerprint=0x0123456789AB, written_at_ms=-5, expires_at_ms=7)
    expected = part(1, 0x0123456789AB, -5, 7, b"abc")
    assert header.seal(b"abc") == expected
    assert read_header(expected) == header


@given(st.integers(0, 255), st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=9))
def test_a_header_survives_packing(level: int, fingerprint: int, at_ms: int, body: bytes) -> None:
    header = Header(level, fingerprint, at_ms, at_ms)
    assert read_header(header.seal(body)) == header


@pytest.mark.parametrize("change", [lambda b: b[:31], lambda b: b[:-1], lambda b: b + b"x", lambda b: b"XX" + b[2:]])
def test_other_bytes_are_refused(change) -> None:
    with pytest.raises(IntegrityError, match="publish it again"):
        read_header(change(Header(0, 1, 0, 0).seal(b"body")))


def test_a_later_record_is_newer_and_any_record_is_newer_than_none() -> None:
    early, late = (Header(0, 1, at_ms, 0).seal(b"") for at_ms in (1, 2))
    assert is_newer(early, late[:-1] + b"x")  # a damaged part is older than anything
    assert [is_newer(late, early), is_newer(early, late), is_newer(late, late), is_newer(early, None)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_vector_part_is_its_header_and_little_endian_numbers() -> None:
    blobs = encode_vectors(np.array([[1, -2], [0.5, 3]]), SPACE, written_at_ms=10, expires_at_ms=20)
    payloads = struct.pack("<ff", 1, -2), struct.pack("<ff", 0.5, 3)
    assert blobs == [part(FULL, int(SPACE, 16), 10, 20, payload) for payload in payloads]


@given(st.data())
def test_a_vector_part_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    sound, other = encode_vectors(np.array([[1, -2], [0.5, 3]]), SPACE, written_at_ms=10)
    damaged = bytearray(other)
    damaged[data.draw(st.integers(0, len(other) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError, match="publish it again"):
        decode_vectors([sound, bytes(damaged)], SPACE, 2, NEUTRAL_VECTOR, dtype="float32", at_ms=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_keep_their_order_and_absent_ones_are_neutral(dtype: str) -> None:
    one, two = encode_vectors(np.array([[1, 2], [3, 4.5]]), SPACE, dtype=dtype, written_at_ms=0)
    batch = decode_vectors([two, None, one, two], SPACE, 2, NEUTRAL_VECTOR, dtype=dtype, at_ms=2**60)
    assert batch.vectors.tolist() == [[3, 4.5], [9, 9], [1, 2], [3, 4.5]]
    assert batch.levels.tolist() == [FULL, NEUTRAL, FULL, FULL]
    assert batch.vectors.dtype == np.float32


def test_without_any_record_all_vectors_are_neutral() -> None:
    batch = decode_vectors([None, None], SPACE, 2, NEUTRAL_VECTOR, dtype="float32", at_ms=0)
    assert (batch.vectors.tolist(), batch.levels.tolist()) == ([[9, 9], [9, 9]], [NEUTRAL, NEUTRAL])
    assert decode_vectors([], SPACE, 2, NEUTRAL_VECTOR, dtype="float32", at_ms=0).vectors.shape == (0, 2)


@pytest.mark.parametrize(("at_ms", "level"), [(19, 3), (20, STALE), (21, STALE)])
def test_a_vector_is_stale_from_its_expiry_on(at_ms: int, level: int) -> None:
    blobs = encode_vectors(np.ones((1, 2)), SPACE, level=3, written_at_ms=0, expires_at_ms=20)
    assert decode_vectors(blobs, SPACE, 2, NEUTRAL_VECTOR, dtype="float32", at_ms=at_ms).levels.tolist() == [level]


@pytest.mark.parametrize(
    ("space", "dim", "dtype"), [("ba9876543210", 2, "float32"), (SPACE, 3, "float32"), (SPACE, 2, "float16")]
)
def test_vectors_of_another_space_or_size_are_refused(space: str, dim: int, dtype: str) -> None:
    blobs = encode_vectors(np.ones((1, 2)), SPACE, written_at_ms=0)
    with pytest.raises(IntegrityError, match="space"):
        decode_vectors([None, *blobs], space, dim, np.zeros(dim, np.float32), dtype=dtype, at_ms=0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=1)), max_size=12), st.integers(1, 4))
def test_batches_are_bounded_ordered_and_without_repeated_keys(stream: list[tuple[str, bytes]], size: int) -> None:
    records = [(EntityKey(ITEM, identity), body) for identity, body in stream]
    batches = list(in_batches(records, size))
    assert [record for batch in batches for record in batch.items()] == records
    assert all(0 < len(batch) <= size for batch in batches)


def test_batches_end_when_they_hold_enough_bytes() -> None:
    records = [(EntityKey(ITEM, str(number)), b"x" * length) for number, length in enumerate([3, 3, 9, 1, 4, 1])]
    lengths = [[len(blob) for blob in batch.values()] for batch in in_batches(records, 10, 5)]
    assert lengths == [[3, 3], [9], [1, 4], [1]]
