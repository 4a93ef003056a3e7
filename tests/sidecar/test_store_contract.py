"""Every store keeps the same promises: memory, LMDB and, where AEROSPIKE_HOSTS names one, a real Aerospike."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kar_sidecar.store import FEATURES, ITEM, TEXT, USER, EntityKey, Store, vector_part
from kar_sidecar.store.memory import MemoryStore
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import STALE, Header, decode_vectors, encode_vectors

pytestmark = pytest.mark.service

SPACE, OTHER = "0123456789ab", "ba9876543210"
ALICE, TOY_STORY, HEAT = EntityKey(USER, "alice"), EntityKey(ITEM, "toy story"), EntityKey(ITEM, "heat")


def blob(body: bytes, written_at_ms: int = 1_000) -> bytes:
    return Header(0, 7, written_at_ms, 0).seal(body)


@pytest.fixture(params=["memory", "lmdb", "aerospike"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "lmdb":
        opened = open_store(f"lmdb:{tmp_path / 'store'}")
    else:
        hosts = os.environ.get("AEROSPIKE_HOSTS")
        if not hosts:
            pytest.skip("AEROSPIKE_HOSTS is not set: start a server with a namespace `test` and set it to HOST:PORT")
        opened = open_store(f"aerospike:{hosts.split(',')[0]}/test/{uuid.uuid4().hex[:12]}")
    yield opened
    for part in (FEATURES, TEXT, vector_part(SPACE), vector_part(OTHER)):
        opened.remove_part(part)
    opened.close()


def test_answers_follow_the_order_of_keys_and_parts(store: Store) -> None:
    store.write(FEATURES, [(ALICE, blob(b"a")), (HEAT, blob(b"h"))])
    store.write(TEXT, [(HEAT, b"a text")])
    assert store.read([HEAT, ALICE], [TEXT, FEATURES], 5) == [(b"a text", blob(b"h")), (None, blob(b"a"))]
    assert store.read([ALICE, HEAT], [FEATURES, TEXT], 5) == [(blob(b"a"), None), (blob(b"h"), b"a text")]


def test_a_key_may_be_asked_for_twice(store: Store) -> None:
    store.write(FEATURES, [(HEAT, blob(b"h"))])
    assert store.read([HEAT, ALICE, HEAT], [FEATURES], 5) == [(blob(b"h"),), (None,), (blob(b"h"),)]


def test_missing_keys_and_parts_are_none(store: Store) -> None:
    store.write(FEATURES, [(HEAT, blob(b"h"))])
    parts = [TEXT, FEATURES, vector_part(SPACE)]
    assert store.read([ALICE, HEAT], parts, 5) == [(None, None, None), (None, blob(b"h"), None)]


def test_nothing_asked_nothing_answered(store: Store) -> None:
    assert store.read([], [FEATURES], 5) == []
    assert store.write(FEATURES, []) == 0
    assert store.remove_part(FEATURES) == 0


def test_kinds_do_not_meet(store: Store) -> None:
    store.write(FEATURES, [(EntityKey(USER, "1"), blob(b"user")), (EntityKey(ITEM, "1"), blob(b"item"))])
    keys = [EntityKey(ITEM, "1"), EntityKey(USER, "1")]
    assert store.read(keys, [FEATURES], 5) == [(blob(b"item"),), (blob(b"user"),)]


def test_writing_one_part_leaves_the_others_alone(store: Store) -> None:
    vector = blob(b"v")
    store.write(vector_part(SPACE), [(ALICE, vector)])
    store.write(FEATURES, [(ALICE, blob(b"old"))])
    store.write(FEATURES, [(ALICE, blob(b"new"))])
    assert store.read([ALICE], [vector_part(SPACE), FEATURES], 5) == [(vector, blob(b"new"))]


@pytest.mark.parametrize(("at_ms", "kept"), [(999, "old"), (1_000, "old"), (1_001, "new")])
@pytest.mark.parametrize("part", [FEATURES, vector_part(SPACE)])
def test_newer_only_compares_the_time_of_writing(store: Store, part: str, at_ms: int, kept: str) -> None:
    assert store.write(part, [(ALICE, blob(b"old", 1_000))]) == 1
    written = store.write(part, [(ALICE, blob(b"new", at_ms)), (HEAT, blob(b"first", 1))], newer_only=True)
    assert written == (2 if kept == "new" else 1)
    expected = blob(b"new", at_ms) if kept == "new" else blob(b"old", 1_000)
    assert store.read([ALICE, HEAT], [part], 5) == [(expected,), (blob(b"first", 1),)]


def test_an_unconditional_write_may_go_back_in_time(store: Store) -> None:
    store.write(FEATURES, [(ALICE, blob(b"late", 2_000))], newer_only=True)
    assert store.write(FEATURES, [(ALICE, blob(b"early", 1_000))]) == 1
    assert store.write(FEATURES, [(ALICE, blob(b"later", 1_500))], newer_only=True) == 1
    assert store.read([ALICE], [FEATURES], 5) == [(blob(b"later", 1_500),)]


def test_the_last_of_several_records_of_one_key_counts(store: Store) -> None:
    assert store.write(FEATURES, [(ALICE, blob(b"1")), (HEAT, blob(b"h")), (ALICE, blob(b"2"))]) == 3
    assert store.read([ALICE], [FEATURES], 5) == [(blob(b"2"),)]


def test_the_newest_of_several_records_of_one_key_counts(store: Store) -> None:
    stream = [(ALICE, blob(b"1", 1)), (ALICE, blob(b"3", 3)), (ALICE, blob(b"2", 2))]
    assert store.write(FEATURES, stream, newer_only=True) == 2
    assert store.read([ALICE], [FEATURES], 5) == [(blob(b"3", 3),)]


def test_a_drained_space_is_removed_and_the_rest_stays(store: Store) -> None:
    many = [EntityKey(ITEM, str(i)) for i in range(1_203)]
    store.write(vector_part(SPACE), [(key, blob(b"1")) for key in [*many, ALICE]])
    store.write(vector_part(OTHER), [(TOY_STORY, blob(b"2")), (ALICE, blob(b"2"))])
    store.write(TEXT, [(many[0], b"text")])
    assert store.remove_part(vector_part(SPACE)) == 1_204
    parts = [vector_part(SPACE), vector_part(OTHER), TEXT]
    expected = [(None, None, b"text"), (None, None, None), (None, blob(b"2"), None), (None, blob(b"2"), None)]
    assert store.read([many[0], many[-1], ALICE, TOY_STORY], parts, 5) == expected
    assert store.remove_part(vector_part(SPACE)) == 0
    assert store.write(vector_part(SPACE), [(ALICE, blob(b"again", 1))], newer_only=True) == 1


def test_meta_values_are_written_replaced_and_removed(store: Store) -> None:
    name = f"space:{SPACE}"
    assert store.read_meta(name) is None
    store.write_meta(name, b'{"release_id": "r1"}')
    store.write_meta("schema:0123456789abcdef", b"{}")
    store.write_meta(name, b'{"release_id": "r2"}')
    assert store.read_meta(name) == b'{"release_id": "r2"}'
    store.write_meta(name, None)
    store.write_meta(name, None)
    assert store.read_meta(name) is None
    assert store.read_meta("schema:0123456789abcdef") == b"{}"
    store.write_meta("schema:0123456789abcdef", None)


def test_meta_values_do_not_meet_entities(store: Store) -> None:
    store.write(FEATURES, [(EntityKey(USER, "meta:x"), blob(b"user"))])
    store.write_meta("x", b"meta")
    assert store.read([EntityKey(USER, "meta:x"), EntityKey(USER, "x")], [FEATURES], 5) == [(blob(b"user"),), (None,)]
    store.write_meta("x", None)


@pytest.mark.parametrize("identity", ["Amélie", "七人の侍", "🎬", "a/b:c d", "", "nul\0inside", "x" * 5_000, "é" * 300])
def test_any_text_is_an_id(store: Store, identity: str) -> None:
    neighbour = EntityKey(ITEM, f"{identity}!")
    key = EntityKey(ITEM, identity)
    store.write(FEATURES, [(key, blob(b"it")), (neighbour, blob(b"other"))])
    assert store.read([key, neighbour], [FEATURES], 5) == [(blob(b"it"),), (blob(b"other"),)]
    assert store.remove_part(FEATURES) == 2


def test_an_expired_vector_is_read_as_stale(store: Store) -> None:
    vectors = np.array([[1, 2], [3, 4]], dtype=np.float32)
    blobs = encode_vectors(vectors, SPACE, written_at_ms=0, expires_at_ms=5_000)
    store.write(vector_part(SPACE), zip([ALICE, HEAT], blobs, strict=True))
    read = [record[0] for record in store.read([HEAT, ALICE], [vector_part(SPACE)], 5)]
    batch = decode_vectors(read, SPACE, 2, np.zeros(2, np.float32), dtype="float32", at_ms=5_000)
    assert batch.levels.tolist() == [STALE, STALE]
    assert batch.vectors.tolist() == [[3, 4], [1, 2]]


def test_a_stream_that_fails_leaves_the_store_readable(store: Store) -> None:
    def stream() -> Iterator[tuple[EntityKey, bytes]]:
        yield HEAT, blob(b"h")
        raise ValueError("the source broke")

    store.write(FEATURES, [(ALICE, blob(b"a"))])
    with pytest.raises(ValueError, match="the source broke"):
        store.write(FEATURES, stream())
    assert store.read([ALICE], [FEATURES], 5) == [(blob(b"a"),)]
