"""Owns a tiny hand-made world: two users, four items, a release, a filled store, and models that are functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from kar.records.v1 import records_pb2
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.features import FeatureLayout, History, schema_hash
from kar_sidecar.ranking.affinity import affinity_columns
from kar_sidecar.ranking.probe import probe_tensors
from kar_sidecar.releases.manifest import Release, manifest_id, write_active
from kar_sidecar.releases.registry import Releases
from kar_sidecar.releases.serving_view import Mode, ServedRelease
from kar_sidecar.scoring.memory import MemoryScorer
from kar_sidecar.settings import Settings
from kar_sidecar.store import FEATURES, TEXT, EntityKey, schema_meta, space_meta, vector_part
from kar_sidecar.store.memory import MemoryStore
from kar_sidecar.store.records import encode_vectors

NUMERIC, CATEGORICAL = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
SPACES = {"prestored": "aaaaaaaaaaaa", "encoded": "eeeeeeeeeeee"}
WRITTEN_AT_MS = 1_000_000

SCHEMA = records_pb2.FeatureSchema(
    features=[
        records_pb2.Feature(name="age", entity=USER.number, type=NUMERIC),
        records_pb2.Feature(name="gender", entity=USER.number, type=CATEGORICAL, width=1),
        records_pb2.Feature(name="year", entity=ITEM.number, type=NUMERIC),
        records_pb2.Feature(name="genres", entity=ITEM.number, type=CATEGORICAL, width=2),
    ],
    history_length=3,
)
ENCODINGS = [
    records_pb2.FeatureEncoding(name="age", entity=USER.number, mean=30, scale=10),
    records_pb2.FeatureEncoding(name="gender", entity=USER.number, vocabulary=["F", "M"]),
    records_pb2.FeatureEncoding(name="year", entity=ITEM.number, mean=1990, scale=10),
    records_pb2.FeatureEncoding(name="genres", entity=ITEM.number, vocabulary=["Action", "Drama"]),
]
ITEMS = ("i1", "i2", "i3", "i4")
"""The item vocabulary: indices 2 to 5. i4 has neither features nor a vector."""


AFFINITY = records_pb2.Affinity(
    space=records_pb2.VectorSpace(space_id="cccccccccccc", dim=2, dtype="float32"),
    segments=[records_pb2.AffinitySegment(name="text", dim=2)],
    events=2,
    mean=[1] * affinity_columns(1),
    scale=[2] * affinity_columns(1),
    learned=True,
)


def make_release(
    releases: Path,
    *,
    backbone: str = "dcnv2",
    space: str = SPACES["prestored"],
    created_s: int = 1,
    towers: Sequence[int] = (),
    affinity: records_pb2.Affinity | None = None,
) -> str:
    """Write a release by hand and return its id."""
    draft = releases / "draft"
    (draft / "vectors").mkdir(parents=True)
    (draft / "item_ids.txt").write_text("".join(f"{item}\n" for item in ITEMS))
    np.save(draft / "vectors" / "neutral.npy", np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    manifest = records_pb2.Manifest(
        dataset="tiny",
        adapted_space=records_pb2.VectorSpace(space_id=space, dim=2, dtype="float32"),
        encoded_space=records_pb2.VectorSpace(space_id=SPACES["encoded"], dim=3, dtype="float16"),
        feature_schema=SCHEMA,
        feature_schema_hash=schema_hash(SCHEMA),
        feature_encodings=ENCODINGS,
        triton_adaptor="adaptor_{release}",
        towers=towers,
        affinity=affinity,
        models=[
            records_pb2.ModelEntry(
                backbone=backbone,
                arm="knowledge",
                triton_model="knowledge_{release}",
                triton_ensemble="encoded_{release}",
            ),
            records_pb2.ModelEntry(backbone=backbone, arm="control", triton_model="control_{release}"),
        ],
        files=[
            records_pb2.FileEntry(path=name, sha256=file_sha256(draft / name), bytes=(draft / name).stat().st_size)
            for name in ("item_ids.txt", "vectors/neutral.npy")
        ],
    )
    manifest.created_at.FromSeconds(created_s)
    manifest.release_id = manifest_id(manifest)
    (draft / "manifest.json").write_text(json_format.MessageToJson(manifest))
    draft.rename(releases / manifest.release_id)
    return manifest.release_id


def fill(store: MemoryStore) -> None:
    """Publish: users u1 (full) and u2 (features only), items i1 (full), i2 (neighbour), i3 (expired in 1970)."""
    users, items = FeatureLayout(SCHEMA, USER), FeatureLayout(SCHEMA, ITEM)
    history = History(("i1", "i2", "gone", "i3"), np.array([5, 3.5, 1, 4], np.float32))
    nothing = History((), np.zeros(0, np.float32))
    at = {"written_at_ms": WRITTEN_AT_MS}
    user_values = {"u1": ({"age": 50, "gender": "M"}, history), "u2": ({"age": 20, "gender": "F"}, nothing)}
    item_values = {
        "i1": {"year": 2000, "genres": ["Action", "Drama"]},
        "i2": {"year": 1980, "genres": ["Drama"]},
        "i3": {"year": None, "genres": ["Musical"]},
    }
    store.write(
        FEATURES,
        [
            *(
                (EntityKey(USER, id_), users.encode(users.row(values), history=events, **at))
                for id_, (values, events) in user_values.items()
            ),
            *((EntityKey(ITEM, id_), items.encode(items.row(values), **at)) for id_, values in item_values.items()),
        ],
    )
    levels = {
        EntityKey(USER, "u1"): records_pb2.KNOWLEDGE_LEVEL_FULL,
        EntityKey(ITEM, "i1"): records_pb2.KNOWLEDGE_LEVEL_FULL,
        EntityKey(ITEM, "i2"): records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR,
        EntityKey(ITEM, "i3"): records_pb2.KNOWLEDGE_LEVEL_FULL,
    }
    for mode, dim, dtype in (("prestored", 2, "float32"), ("encoded", 3, "float16")):
        for row, (key, level) in enumerate(levels.items(), 1):
            vector = np.full((1, dim), row, np.float32)
            expires = {"expires_at_ms": 1} if key.id == "i3" else {}
            [blob] = encode_vectors(vector, SPACES[mode], dtype=dtype, level=level, **at, **expires)
            store.write(vector_part(SPACES[mode]), [(key, blob)])
        store.write_meta(space_meta(SPACES[mode]), b"{}")
    store.write_meta(schema_meta(schema_hash(SCHEMA)), b"{}")
    text = records_pb2.KnowledgeRecord(id="i1", entity=ITEM.number, text="A film.", template="factual/1")
    store.write(TEXT, [(EntityKey(ITEM, "i1"), text.SerializeToString())])


def squash(x):
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def control(tensors):
    """Newer films first, then by index."""
    return squash(tensors["item_numeric"][:, 0] + tensors["item_index"] / 100)


def knowledge(tensors):
    return squash(tensors["item_knowledge"] @ tensors["user_knowledge"] / 10 + tensors["item_numeric"][:, 0])


def encoded(tensors):
    present = tensors["item_present"] * tensors["user_present"]
    return squash(present * (tensors["item_encoding"] @ tensors["user_encoding"]) / 10)


def models(*release_ids: str) -> dict:
    """The functions behind the model names of releases."""
    kinds = {"control": control, "knowledge": knowledge, "encoded": encoded, "adaptor": lambda tensors: None}
    return {f"{kind}_{id_}": function for id_ in release_ids for kind, function in kinds.items()}


class StubbornStore(MemoryStore):
    """A store in memory that can fail with `fault`, and wait in `gate` (then it counts as blocking)."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Exception | None = None
        self.gate: Callable[[], object] | None = None
        self.reads: list[tuple] = []

    @property
    def blocking(self) -> bool:
        return self.gate is not None

    def read(self, keys, parts, timeout_s=None):
        self.reads.append((tuple(keys), tuple(parts), timeout_s))
        if self.gate:
            self.gate()
        if self.fault:
            raise self.fault
        return super().read(keys, parts, timeout_s)

    def read_meta(self, name):
        if self.gate:
            self.gate()
        if self.fault:
            raise self.fault
        return super().read_meta(name)


@dataclass
class World:
    """The release folder, store and scorer of a sidecar, with an active release."""

    folder: Path
    release_id: str = ""
    store: StubbornStore = field(default_factory=StubbornStore)
    scorer: MemoryScorer = field(default_factory=lambda: MemoryScorer({}))

    def add_release(self, **choices) -> str:
        release_id = make_release(self.folder, **choices)
        self.scorer.models |= models(release_id)
        return release_id

    def served(self, mode: Mode = "prestored") -> ServedRelease:
        return ServedRelease(Release.load(self.folder, self.release_id), mode)

    def releases(self, mode: Mode = "prestored") -> Releases:
        """The releases of a server on this world; nothing is loaded yet."""
        return Releases(self.folder, self.store, self.scorer, mode, probe_tensors=probe_tensors, warm_timeout_s=30)

    def settings(self, **changes) -> Settings:
        # Long limits, so that a busy machine degrades no request.
        generous = {"store_timeout_ms": 30_000, "score_timeout_ms": 30_000, "health_interval_ms": 5}
        ports = {"grpc_port": 0, "metrics_port": 0}
        return Settings.read(**{"releases": self.folder, "grace_s": 0.2, **ports, **generous, **changes})


@pytest.fixture
def world(tmp_path) -> World:
    tiny = World(tmp_path / "releases")
    tiny.folder.mkdir()
    tiny.release_id = tiny.add_release()
    write_active(tiny.folder, tiny.release_id)
    fill(tiny.store)
    return tiny


@pytest.fixture
def fill_store() -> Callable[[MemoryStore], None]:
    """A function that publishes the tiny world into any store."""
    return fill


@pytest.fixture
def affine(world):
    """The world with a release that has the item tower alone and the affinity of the last two rated items."""
    release_id = make_release(world.folder, towers=[ITEM.number], affinity=AFFINITY)
    write_active(world.folder, release_id)
    space = AFFINITY.space.space_id
    blobs = encode_vectors(np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32), space, written_at_ms=1)
    items = [EntityKey(ITEM, name) for name in ("i1", "i2", "i3")]
    world.store.write(vector_part(space), list(zip(items, blobs, strict=True)))
    world.store.write_meta(space_meta(space), b"{}")
    world.scorer.models |= models(release_id)
    world.scorer.models[f"knowledge_{release_id}"] = lambda tensors: squash(tensors["affinity"].sum(1))
    world.release_id = release_id
    return world
