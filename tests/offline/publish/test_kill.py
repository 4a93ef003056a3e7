"""A publish killed at any moment leaves a readable store, and the next one goes on from there."""

import os
import random
import signal
import uuid
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from google.protobuf import json_format
from tests.support.killed_publish import KilledPublish, publish_killer
from tests.support.publishable import ENCODED, NOW_MS, schema_of

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.knowledge.records import record_line
from kar_offline.publish.checkpoint import publish_meta
from kar_offline.publish.part_writes import paced
from kar_offline.publish.stage import publish_release
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.features import FeatureLayout, schema_hash
from kar_sidecar.releases.manifest import Release, manifest_id
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Record, Store, space_meta, vector_part
from kar_sidecar.store.memory import MemoryStore
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, NEUTRAL, decode_vectors

pytestmark = pytest.mark.service

ADAPTED = "aaaaaaaaaaaa"
USERS, ITEMS = [f"u{n}" for n in range(120)], [f"i{n}" for n in range(230)]
KEYS = [*(EntityKey(USER, id_) for id_ in USERS), *(EntityKey(ITEM, id_) for id_ in ITEMS)]
PARTS = (FEATURES, TEXT, vector_part(ADAPTED), vector_part(ENCODED))
EVERY = 40
"""Records between two notes: 350 are no multiple, so the last ones of a kind are fewer."""
STEPS = 1 + 4 * (350 + 2 * 9) + 4
"""Schema's claim; four kinds of records, with 9 batches and 9 notes each; seals and the notes' removal."""
MOMENTS = sorted(random.Random(5).sample(range(2, STEPS), 7))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """Every user rated one item; every entity has a text and vectors."""
    work = WorkFolder(tmp_path_factory.mktemp("kill"))
    work.dataset.mkdir()
    count = len(USERS)
    Dataset(
        name="tiny",
        schema=schema_of(),
        users=[Entity(id_, {"age": 30}, {}) for id_ in USERS],
        items=[Entity(id_, {"genres": [id_]}, {}) for id_ in ITEMS],
        offsets=np.arange(count + 1),
        event_item=np.arange(count, dtype=np.int32),
        event_rating=np.full(count, 4, np.float32),
        event_time=np.arange(1, count + 1),
        cutoff=np.ones(count, np.int32),
        event_split=np.zeros(count, np.uint8),
        positive_above=3,
    ).save(work.dataset)
    draft = work.releases / "draft"
    for name in ("vectors", "knowledge"):
        (draft / name).mkdir(parents=True)
    for kind, ids in (("user", USERS), ("item", ITEMS)):
        (draft / "vectors" / f"{kind}_ids.txt").write_text("".join(f"{id_}\n" for id_ in ids))
        rows = np.arange(len(ids), dtype=np.float32)[:, None]
        np.save(draft / "vectors" / f"{kind}_adapted.npy", rows + np.array([0, 0.5], np.float32))
        np.save(draft / "vectors" / f"{kind}_encoded.npy", np.cos(rows * [1, 2, 3]).astype(np.float32))
        lines = (record_line(records_pb2.KnowledgeRecord(id=id_, text=f"{id_} is good")) + "\n" for id_ in ids)
        (draft / "knowledge" / f"{kind}.jsonl").write_text("".join(lines))
    manifest = records_pb2.Manifest(
        dataset="tiny",
        adapted_space=records_pb2.VectorSpace(space_id=ADAPTED, dim=2, dtype="float32"),
        encoded_space=records_pb2.VectorSpace(space_id=ENCODED, dim=3, dtype="float16"),
        feature_schema=schema_of(),
        feature_schema_hash=schema_hash(schema_of()),
    )
    manifest.created_at.FromSeconds(5)
    manifest.release_id = manifest_id(manifest)
    (draft / "manifest.json").write_text(json_format.MessageToJson(manifest))
    draft.rename(work.releases / manifest.release_id)
    (work.root / "release").write_text(manifest.release_id)
    return work


def resume(work: WorkFolder, store: Store, name: object, **options: bool) -> dict[str, int]:
    release = Release.load(work.releases, (work.root / "release").read_text())
    dataset = work.read(Dataset)
    return dict(
        publish_release(
            release, dataset, store, work.root / f"index{name}", checkpoint_every=EVERY, clock=lambda: NOW_MS, **options
        )
    )


def read_all(store: Store) -> list[Record]:
    return store.read(KEYS, PARTS, 5)


def assert_readable(records: list[Record], undisturbed: list[Record]) -> None:
    """Every part is whole or absent, and decodes."""
    for record, whole in zip(records, undisturbed, strict=True):
        assert all(part in (None, expected) for part, expected in zip(record, whole, strict=True))
    layout = FeatureLayout(schema_of(), USER)
    assert all(len(layout.decode_user(record[0]).history.item_ids) <= 1 for record in records[: len(USERS)])
    for column, (space, dim, dtype) in ((2, (ADAPTED, 2, "float32")), (3, (ENCODED, 3, "float16"))):
        blobs = [record[column] for record in records]
        levels = decode_vectors(blobs, space, dim, np.zeros(dim, np.float32), dtype=dtype, at_ms=0).levels
        assert levels.tolist() == [NEUTRAL if blob is None else FULL for blob in blobs]


@pytest.mark.parametrize("kind", ["lmdb", "aerospike"])
def test_a_killed_publish_leaves_a_readable_store_and_the_next_goes_on(work: WorkFolder, kind: str) -> None:
    url = f"lmdb:{work.root / 'store'}"
    if kind == "aerospike":
        if not (hosts := os.environ.get("AEROSPIKE_HOSTS")):
            pytest.skip("AEROSPIKE_HOSTS is not set: start a server with a namespace `test` and set it to HOST:PORT")
        url = f"aerospike:{hosts}/test/{uuid.uuid4().hex[:8]}-"
    memory = MemoryStore()
    assert resume(work, memory, "memory") == dict.fromkeys(("features", "texts", "adapted", "encoded"), 350)
    undisturbed = read_all(memory)
    release_id = (work.root / "release").read_text()
    with publish_killer() as killer:
        for moment in MOMENTS:
            publish = KilledPublish(
                str(work), release_id, f"{url}{moment}", f"index{moment}", moment, checkpoint_every=EVERY
            )
            assert killer.run(publish) == -signal.SIGKILL
    for moment in MOMENTS:
        reader = open_store(f"{url}{moment}", readonly=True)
        found = read_all(reader)
        assert reader.read_meta(space_meta(ADAPTED)) is None  # seen as not published
        reader.close()
        assert_readable(found, undisturbed)
        there = sum(part is not None for record in found for part in record)
        writer = open_store(f"{url}{moment}")
        assert sum(resume(work, writer, moment).values()) == 4 * 350 - there
        assert read_all(writer) == undisturbed
        assert writer.read_meta(publish_meta(release_id)) is None
        assert writer.read_meta(space_meta(ADAPTED)) is not None
        assert resume(work, writer, moment) == {}
        for part in PARTS:
            writer.remove_part(part)
        writer.close()


class Counting(MemoryStore):
    """Fails after so many records were offered to it."""

    def __init__(self, fails_after: int) -> None:
        super().__init__()
        self.offered, self.fails_after = 0, fails_after

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        def counted() -> Iterable[tuple[EntityKey, bytes]]:
            for record in records:
                self.offered += 1
                if self.offered > self.fails_after:
                    raise InterruptedError
                yield record

        return super().write(part, counted(), newer_only=newer_only)


def broken_off(work: WorkFolder, after: int, **options: bool) -> Counting:
    store = Counting(after)
    with pytest.raises(InterruptedError):
        resume(work, store, "counting", **options)
    store.offered, store.fails_after = 0, 10_000
    return store


@pytest.mark.parametrize(("after", "noted"), [(39, 0), (40, 40), (41, 40), (349, 320), (350, 350), (500, 350 + 120)])
def test_what_was_noted_is_not_offered_again(work: WorkFolder, after: int, noted: int) -> None:
    store = broken_off(work, after)
    resume(work, store, "counting")
    assert store.offered == 4 * 350 - noted


def test_another_publish_does_not_trust_the_notes(work: WorkFolder) -> None:
    store = broken_off(work, 500, force=True)
    resume(work, store, "counting")
    assert store.offered == 4 * 350


def test_a_part_that_was_removed_meanwhile_is_written_again(work: WorkFolder) -> None:
    store = broken_off(work, 500)
    store.remove_part(FEATURES)
    assert resume(work, store, "counting")["features"] == 350
    assert store.offered == 4 * 350 - 120


class Clock:
    """Seconds that pass only while somebody sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_capped_rate_spreads_records_and_makes_up_for_half_a_second() -> None:
    clock = Clock()
    times = []
    records = iter([(EntityKey(ITEM, str(n)), b"") for n in range(400)])
    for number, _ in enumerate(paced(records, 100, clock=clock, sleep=clock.sleep)):
        times.append(clock.now)
        if number == 199:
            clock.sleep(10)  # the store was lost for a while
    assert times[199] == pytest.approx(1.99, abs=0.01)
    assert max(later - earlier for earlier, later in pairwise(times[:200])) < 0.021
    assert times[250] == times[200] == times[199] + 10  # 50 records at once make up for half a second
    assert times[-1] == pytest.approx(times[250] + 1.49, abs=0.02)
