"""Every store keeps the same promises: memory, LMDB and, where AEROSPIKE_HOSTS names one, a real Aerospike."""

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IncompleteError, UnavailableError
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Store, vector_part
from kar_sidecar.store.memory import MemoryStore
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, STALE, Header, decode_vectors, encode_vectors, read_header

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
            pytest.skip(
                "AEROSPIKE_HOSTS is not set: start a server with a namespace `test` and set it to HOST:PORT[,HOST:PORT]"
            )
        opened = open_store(f"aerospike:{hosts}/test/{uuid.uuid4().hex[:12]}")
    yield opened
    for part in (FEATURES, TEXT, vector_part(SPACE), vector_part(OTHER)):
        opened.remove_part(part)
    opened.close()


def test_answers_follow_the_order_of_keys_and_parts(store: Store) -> None:
    store.write(FEATURES, [(ALICE, blob(b"a")), (HEAT, blob(b"h"))])
    store.write(TEXT, [(HEAT, b"a text")])
    assert store.read([HEAT, ALICE], [TEXT, FEATURES], 5) == [(b"a text", blob(b"h")), (None, blob(b"a"))]
    assert store.read([ALICE, HEAT], [FEATURES, TEXT], 5) == [(blob(b"a"), None), (blob(b"h"), b"a text")]


def test_a_key_may_be_read_twice_in_one_batch(store: Store) -> None:
    store.write(FEATURES, [(HEAT, blob(b"h"))])
    assert store.read([HEAT, ALICE, HEAT], [FEATURES], 5) == [(blob(b"h"),), (None,), (blob(b"h"),)]


def test_missing_keys_and_parts_are_none(store: Store) -> None:
    store.write(FEATURES, [(HEAT, blob(b"h"))])
    parts = [TEXT, FEATURES, vector_part(SPACE)]
    assert store.read([ALICE, HEAT], parts, 5) == [(None, None, None), (None, blob(b"h"), None)]


def test_a_read_of_no_keys_returns_nothing(store: Store) -> None:
    assert store.read([], [FEATURES], 5) == []
    assert store.write(FEATURES, []) == 0
    assert store.remove_part(FEATURES) == 0


def test_users_and_items_of_the_same_id_are_separate(store: Store) -> None:
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


def test_an_unconditional_write_may_replace_a_newer_record(store: Store) -> None:
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


def test_removing_a_space_leaves_the_other_parts(store: Store) -> None:
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


def test_meta_values_and_entities_are_separate(store: Store) -> None:
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


@pytest.mark.parametrize(("at_ms", "level"), [(4_999, FULL), (5_000, STALE), (5_001, STALE)])
def test_an_expired_vector_is_read_as_stale(store: Store, at_ms: int, level: int) -> None:
    vectors = np.array([[1, 2], [3, 4]], dtype=np.float32)
    blobs = encode_vectors(vectors, SPACE, written_at_ms=0, expires_at_ms=5_000)
    store.write(vector_part(SPACE), zip([ALICE, HEAT], blobs, strict=True))
    read = [record[0] for record in store.read([HEAT, ALICE], [vector_part(SPACE)], 5)]
    batch = decode_vectors(read, SPACE, 2, np.zeros(2, np.float32), dtype="float32", at_ms=at_ms)
    assert batch.levels.tolist() == [level, level]
    assert batch.vectors.tolist() == [[3, 4], [1, 2]]


def test_a_stream_that_fails_leaves_the_store_readable(store: Store) -> None:
    def stream() -> Iterator[tuple[EntityKey, bytes]]:
        yield HEAT, blob(b"h")
        raise ValueError("the source broke")

    store.write(FEATURES, [(ALICE, blob(b"a"))])
    with pytest.raises(ValueError, match="the source broke"):
        store.write(FEATURES, stream())
    assert store.read([ALICE], [FEATURES], 5) == [(blob(b"a"),)]


@pytest.mark.parametrize("newer_only", [False, True])
def test_records_that_are_stored_already_are_not_written(store: Store, newer_only: bool) -> None:
    records = [(ALICE, blob(b"a")), (HEAT, blob(b"h"))]
    assert store.write(FEATURES, records) == 2
    assert store.write(FEATURES, [*records, (TOY_STORY, blob(b"t"))], newer_only=newer_only) == 1
    assert store.write(TEXT, [(HEAT, b"text")]) == 1
    assert store.write(TEXT, [(HEAT, b"text")]) == 0
    assert store.write(TEXT, [(HEAT, b"")]) == 1
    assert store.read([HEAT, TOY_STORY], [FEATURES, TEXT], 5) == [(blob(b"h"), b""), (blob(b"t"), None)]


MANY = [EntityKey(kind, str(i)) for kind in (USER, ITEM) for i in range(30)]
VERSIONS = 15


def versioned(version: int) -> bytes:
    """A record whose bytes all equal the version, so that a torn record shows; larger than a memory page."""
    return blob(bytes([version]) * 5_000, version)


def version_of(part: bytes | None) -> int:
    """The version of a whole record, 0 for none."""
    if part is None:
        return 0
    version = read_header(part).written_at_ms  # refuses what its checksum does not fit
    assert part == versioned(version)
    return version


def together(*jobs: Callable[[], None]) -> None:
    """Run jobs at once, each in a thread of its own."""
    barrier = threading.Barrier(len(jobs))

    def begin(job: Callable[[], None]) -> None:
        barrier.wait(30)
        job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(begin, job) for job in jobs]:
            done.result(60)


def test_feature_updates_beside_vector_publishes_lose_nothing(store: Store) -> None:
    def updates(versions: range) -> Callable[[], None]:
        def job() -> None:
            for version in versions:
                store.write(FEATURES, [(key, versioned(version)) for key in MANY], newer_only=True)

        return job

    def publishes(space: str) -> Callable[[], None]:
        def job() -> None:
            for version in range(1, VERSIONS + 1):
                store.write(vector_part(space), [(key, versioned(version)) for key in MANY])

        return job

    odd, even = updates(range(1, VERSIONS + 1, 2)), updates(range(2, VERSIONS + 1, 2))
    together(odd, even, publishes(SPACE), publishes(OTHER))
    parts = [FEATURES, vector_part(SPACE), vector_part(OTHER)]
    assert store.read(MANY, parts, 5) == [(versioned(VERSIONS),) * 3] * len(MANY)


def test_readers_beside_a_writer_see_whole_records_that_never_get_older(store: Store) -> None:
    parts = [FEATURES, TEXT]
    over = threading.Event()
    store.write(FEATURES, [(key, versioned(1)) for key in MANY])

    def write() -> None:
        for version in range(2, VERSIONS + 1):
            store.write(FEATURES, [(key, versioned(version)) for key in MANY], newer_only=True)
        over.set()

    def read() -> None:
        last_read = [1] * len(MANY)
        last = False
        while not last:
            last = over.is_set()
            found = [version_of(record[0]) for record in store.read(MANY, parts, 5)]
            assert all(now >= before for now, before in zip(found, last_read, strict=True))
            last_read = found
        assert last_read == [VERSIONS] * len(MANY)

    together(write, read, read, read)


def test_readers_beside_the_removal_of_a_space_see_whole_records_or_none(store: Store) -> None:
    store.write(vector_part(SPACE), [(key, versioned(1)) for key in MANY])
    store.write(FEATURES, [(key, versioned(2)) for key in MANY])

    def read() -> None:
        left = len(MANY)
        while left:
            records = store.read(MANY, [vector_part(SPACE), FEATURES], 5)
            assert all(version_of(record[1]) == 2 for record in records)
            left = sum(version_of(record[0]) for record in records)

    def remove() -> None:
        assert store.remove_part(vector_part(SPACE)) == len(MANY)

    together(remove, read, read)


def test_a_server_that_is_lost_and_comes_back_is_used_again(store: Store, request: pytest.FixtureRequest) -> None:
    if store.blocking is False:
        pytest.skip("nothing to lose: the store is in this process")
    if not (pid := os.environ.get("AEROSPIKE_PID")):
        pytest.skip("AEROSPIKE_PID is not set: set it to the server's process id, which the test stops and continues")
    server = int(pid)
    request.addfinalizer(lambda: os.kill(server, signal.SIGCONT))
    store.write(FEATURES, [(key, versioned(1)) for key in MANY])
    stopped = threading.Event()

    def write() -> None:
        stopped.wait(10)
        assert store.write(FEATURES, [(key, versioned(2)) for key in MANY]) <= len(MANY)
        store.write_meta("lost", b"found")

    def lose() -> None:
        os.kill(server, signal.SIGSTOP)
        stopped.set()
        for _ in range(5):
            with pytest.raises(UnavailableError, match="Aerospike") as caught:
                store.read(MANY, [FEATURES], 0.1)
            if isinstance(caught.value, IncompleteError):  # other nodes of the cluster still answer
                read = [version_of(record[0]) for record in caught.value.records]
                assert [at for at, version in enumerate(read) if version == 0] == list(caught.value.unread)
        os.kill(server, signal.SIGCONT)

    together(write, lose)
    read = None
    while read is None:  # the first tries may meet connections that were closed meanwhile
        with suppress(UnavailableError):
            read = store.read(MANY, [FEATURES], 1)
    assert read == [(versioned(2),)] * len(MANY)
    assert store.read_meta("lost") == b"found"
    store.write_meta("lost", None)
