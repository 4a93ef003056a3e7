"""Owns a work folder with a small release that can be published: two users, three items, vectors made by hand."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.knowledge.records import record_line
from kar_offline.publish import publish
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.features import FeatureLayout, schema_hash
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import read_current
from kar_sidecar.releases.manifest import manifest_id
from kar_sidecar.store import FEATURES, TEXT, EntityKey, schema_meta, space_meta, vector_part
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, NEUTRAL, STALE, decode_vectors

AFFINITY = "fffffffffffe"
ENCODED = "cccccccccccc"
NOW_MS = 1_800_000_000_000
LAST_EVENT_S = 900
ITEMS = ("heat", "alien", "ran")
COUNTS = {"users": 2, "items": 2, "lent": {"users": 0, "items": 0}}


def schema_of(history_length: int = 4) -> records_pb2.FeatureSchema:
    numeric, categorical = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
    return records_pb2.FeatureSchema(
        features=[
            records_pb2.Feature(name="age", entity=USER.number, type=numeric),
            records_pb2.Feature(name="genres", entity=ITEM.number, type=categorical, width=2),
        ],
        history_length=history_length,
    )


def make_dataset(work: WorkFolder, schema: records_pb2.FeatureSchema) -> None:
    """ann rated heat (100 s), alien (200 s), ran (300 s), and prompts may show the first two; bob rated ran (900 s)."""
    work.dataset.mkdir(exist_ok=True)
    Dataset(
        name="tiny",
        schema=schema,
        users=[Entity("ann", {"age": 30}, {}), Entity("bob", {"age": None}, {})],
        items=[Entity(item, {"genres": [item]}, {}) for item in ITEMS],
        offsets=np.array([0, 3, 4]),
        event_item=np.array([0, 1, 2, 2], np.int32),
        event_rating=np.array([5, 4, 1, 3], np.float32),
        event_time=np.array([100, 200, 300, LAST_EVENT_S]),
        cutoff=np.array([2, 1], np.int32),
        event_split=np.zeros(4, np.uint8),
        positive_above=3,
    ).save(work.dataset)


def make_release(
    work: WorkFolder,
    schema: records_pb2.FeatureSchema,
    *,
    adapted: str = "aaaaaaaaaaaa",
    scale: float = 1,
    created_s: int = 5,
    affinity: bool = False,
    loans: tuple[str, ...] = (),
    recipe: str = "",
) -> str:
    """ann, bob, heat and alien have knowledge; heat's expires at 50 s. Vectors are multiples of `scale`.

    With `loans`, alien's vector is imputed from those records; cluster/0's text expires at 40 s, cluster/1's never.
    """
    draft = work.releases / "draft"
    for name in ("vectors", "knowledge"):
        (draft / name).mkdir(parents=True)
    vectors = {"user": ["ann", "bob"], "item": ["heat", "alien"]}
    for number, (kind, ids) in enumerate(vectors.items()):
        (draft / "vectors" / f"{kind}_ids.txt").write_text("".join(f"{identity}\n" for identity in ids))
        np.save(draft / "vectors" / f"{kind}_adapted.npy", np.array([[1, 2], [3, 4 + number]], np.float32) * scale)
        np.save(draft / "vectors" / f"{kind}_encoded.npy", np.array([[1, 0, 0], [0, 1, number]], np.float32) * scale)
        with (draft / "knowledge" / f"{kind}.jsonl").open("w") as file:
            for identity in ids:
                record = records_pb2.KnowledgeRecord(id=identity, text=f"{identity} is good", template="factual/1")
                if identity == "heat":
                    record.expires_at.FromSeconds(50)
                if identity == "alien" and loans:
                    shares = [records_pb2.Loan(id=neighbour, weight=1 / len(loans)) for neighbour in loans]
                    record = records_pb2.KnowledgeRecord(id=identity, loans=shares)
                file.write(record_line(record) + "\n")
    if loans:
        (draft / "vectors" / "item_lent.txt").write_text("alien\n")
        clusters = [records_pb2.KnowledgeRecord(id=f"cluster/{number}", text="good films") for number in range(2)]
        clusters[0].expires_at.FromSeconds(40)
        lines = (record_line(cluster) + "\n" for cluster in clusters)
        (draft / "knowledge" / "item_clusters.jsonl").write_text("".join(lines))
    more: dict[str, Any] = {"models": [records_pb2.ModelEntry(arm="knowledge", recipe=recipe)]}
    if affinity:
        (draft / "vectors" / "user_adapted.npy").unlink()
        (draft / "vectors" / "affinity_ids.txt").write_text("alien\n")
        np.save(draft / "vectors" / "affinity.npy", np.array([[0.6, 0.8]], np.float32))
        space = records_pb2.VectorSpace(space_id=AFFINITY, dim=2, dtype="float32")
        more |= {"towers": [ITEM.number], "affinity": records_pb2.Affinity(space=space, events=3)}
    (draft / "item_ids.txt").write_text("".join(f"{item}\n" for item in ITEMS))
    manifest = records_pb2.Manifest(
        dataset="tiny",
        adapted_space=records_pb2.VectorSpace(space_id=adapted, dim=2, dtype="float32"),
        encoded_space=records_pb2.VectorSpace(space_id=ENCODED, dim=3, dtype="float16"),
        feature_schema=schema,
        feature_schema_hash=schema_hash(schema),
        **more,
        files=[
            records_pb2.FileEntry(
                path=path.relative_to(draft).as_posix(), sha256=file_sha256(path), bytes=path.stat().st_size
            )
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        ],
    )
    manifest.created_at.FromSeconds(created_s)
    manifest.release_id = manifest_id(manifest)
    (draft / "manifest.json").write_text(json_format.MessageToJson(manifest))
    draft.rename(work.releases / manifest.release_id)
    return manifest.release_id


@dataclass(frozen=True)
class World:
    work: WorkFolder
    release: str
    url: str

    def publish(self, release: str | None = None, **options: bool) -> dict:
        result = publish(self.work, release or self.release, self.url, clock=lambda: NOW_MS, **options)
        return {**asdict(result.report), "ran": result.ran}

    def read(self, kind: int, ids: list[str], part: str) -> list[bytes | None]:
        store = open_store(self.url, readonly=True)
        records = store.read([EntityKey(kind, identity) for identity in ids], [part])
        store.close()
        return [record[0] for record in records]

    def meta(self, name: str) -> dict | None:
        store = open_store(self.url, readonly=True)
        value = store.read_meta(name)
        store.close()
        return None if value is None else json.loads(value)

    def history(self, user: str) -> tuple[tuple[str, ...], list[float], int]:
        read = FeatureLayout(schema_of(), USER).decode_user(self.read(USER, [user], FEATURES)[0])
        return read.history.item_ids, read.history.ratings.tolist(), read.written_at_ms

    def vectors(self, kind: int, ids: list[str], space: str, dim: int, dtype: str, at_ms: int = 0):
        blobs = self.read(kind, ids, vector_part(space))
        return decode_vectors(blobs, space, dim, np.zeros(dim, np.float32), dtype=dtype, at_ms=at_ms)

    @staticmethod
    def make(folder: Path) -> "World":
        """The dataset and a release in `folder`; its store will be an LMDB folder beside them."""
        work = WorkFolder(folder)
        make_dataset(work, schema_of())
        return World(work, make_release(work, schema_of()), f"lmdb:{work.store}")


def index_of(world: World, kind: str) -> FaissIndex:
    root = world.work.index / world.release / kind
    current = read_current(root)
    assert current is not None
    return FaissIndex.load(root / current.snapshot_id)


def assert_complete(world: World) -> None:
    assert world.history("ann") == (("heat", "alien"), [5, 4], 200_000)  # not the third event: it is a sample
    assert world.history("bob") == (("ran",), [3], 900_000)
    users, items = FeatureLayout(schema_of(), USER), FeatureLayout(schema_of(), ITEM)
    assert users.decode_user(world.read(USER, ["ann"], FEATURES)[0]).row["age"].tolist() == [30]
    rows = items.decode_items(world.read(ITEM, list(ITEMS), FEATURES))
    assert rows.tobytes() == b"".join(items.row({"genres": [item]}).tobytes() for item in ITEMS)
    adapted = world.vectors(ITEM, ["alien", "ran", "heat"], "aaaaaaaaaaaa", 2, "float32", at_ms=49_999)
    assert (adapted.vectors.tolist(), adapted.levels.tolist()) == ([[3, 5], [0, 0], [1, 2]], [FULL, NEUTRAL, FULL])
    expired = world.vectors(ITEM, ["alien", "heat"], "aaaaaaaaaaaa", 2, "float32", at_ms=50_000)
    assert expired.levels.tolist() == [FULL, STALE]
    encoded = world.vectors(USER, ["bob", "ann"], ENCODED, 3, "float16")
    assert (encoded.vectors.tolist(), encoded.levels.tolist()) == ([[0, 1, 0], [1, 0, 0]], [FULL, FULL])
    heat, ran = world.read(ITEM, ["heat", "ran"], TEXT)
    assert heat is not None
    assert records_pb2.KnowledgeRecord.FromString(heat).text == "heat is good"
    assert ran is None
    seal = {"release_id": world.release, **COUNTS, "published_at_ms": NOW_MS}
    names = [space_meta("aaaaaaaaaaaa"), space_meta(ENCODED), schema_meta(schema_hash(schema_of()))]
    assert [world.meta(name) for name in names] == [seal] * 3
    index = index_of(world, "item")
    assert index.search(np.array([[0, 1, 1]]), 2).ids == [["alien", "heat"]]
    index.close()
    index = index_of(world, "user")
    assert index.search(np.array([[1, 0.5, 0]]), 1).ids == [["ann"]]
    index.close()


def feature_line(**changes: object) -> str:
    record = {"entity": "user", "id": "ann", "features": {"age": 31}, "history": [["ran", 2.5]]}
    return json.dumps({**record, "as_of": "1970-01-01T00:10:00Z", **changes}) + "\n"
