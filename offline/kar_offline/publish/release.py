"""Owns publishing a release: features, texts and vectors into the store, vectors into the index, then the seal.

The seals are meta values, `space:<id>` of both vector spaces and `schema:<hash>` of the features, written after all
data: a killed publish is visible as not published, and running it again completes it.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from kar.records.v1 import records_pb2
from kar_offline.dataset.samples import Dataset
from kar_offline.generate.records import read_clusters, read_knowledge
from kar_offline.stage import StageResult
from kar_offline.train.arms import ARMS
from kar_sidecar.errors import PreconditionError
from kar_sidecar.features import History, schema_hash
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.release import Release
from kar_sidecar.store import FEATURES, ITEM, TEXT, USER, EntityKey, Store, schema_meta, space_meta, vector_part
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, NEVER, encode_vectors, now_ms

__all__ = ["publish", "publish_release"]

NAMES: Final = {USER: "user", ITEM: "item"}
NEIGHBOUR: Final = int(records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR)
SCHEMA: Final = "features"
"""Name of the meta value that holds the hash of the one schema that the store's features are packed in."""

Records = Iterator[tuple[EntityKey, bytes]]


def publish(
    work: Path,
    release_id: str,
    store_url: str,
    *,
    force: bool = False,
    clock: Callable[[], int] = now_ms,
    progress: Progress | None = None,
) -> StageResult:
    """Publish a release of a work folder into the store that `store_url` names; does nothing when it is there.

    `force` publishes again, and replaces features of another schema. `clock` gives milliseconds since the epoch. The
    report has `release_id`, `store`, `users` and `items` with a vector, how many of them are `lent`,
    `published_at_ms`, and records `written`.

    Raises:
        NotFoundError: no such release.
        IntegrityError: a corrupt release or store.
        PreconditionError: the dataset, or what the store holds, is of another feature schema.
        UnavailableError: the store does not answer.
    """
    began = time.perf_counter()
    release = Release.load(work / "releases", release_id)
    dataset = Dataset.load(work / "dataset")
    index = work / "index" / release_id
    store = open_store(store_url)
    try:
        written = publish_release(release, dataset, store, index, force=force, clock=clock, progress=progress)
        seal = read_seal(store, space_meta(release.manifest.adapted_space.space_id))
    finally:
        store.close()
    report = {**seal, "store": store_url, "written": dict(written)}
    return StageResult("publish", index, bool(written), time.perf_counter() - began, report)


def publish_release(
    release: Release,
    dataset: Dataset,
    store: Store,
    index: Path,
    *,
    force: bool = False,
    clock: Callable[[], int] = now_ms,
    progress: Progress | None = None,
) -> Mapping[str, int]:
    """Write all of a release and return the number of records written by kind of part; nothing when it was there.

    Records that the store already has, newer or from a killed run, are kept. See `publish` for errors.
    """
    manifest = release.manifest
    schema = manifest.feature_schema_hash
    if schema_hash(dataset.schema) != schema:
        raise PreconditionError(f"the dataset has another feature schema than {release.folder}: export a release of it")
    if not force and _is_published(release, store, index):
        return {}
    _claim_features(store, schema, force)
    users, items = (_Knowledge.load(release, kind) for kind in NAMES)
    shown = progress or Progress(disable=True)

    def write(part: str, what: str, records: Iterable[tuple[EntityKey, bytes]], total: int, *, newer_only: bool) -> int:
        return store.write(part, shown.track(records, total, description=what), newer_only=newer_only)

    written = {
        "features": write(
            FEATURES,
            "features",
            chain(_user_features(release, dataset), _item_features(release, dataset)),
            len(dataset.users) + len(dataset.items),
            newer_only=store.read_meta(schema_meta(schema)) is not None,
        ),
        "texts": write(
            TEXT,
            "texts",
            chain(users.texts(), items.texts()),
            len(users.texts_by_id) + len(items.texts_by_id),
            newer_only=False,
        ),
    }
    sources = (users, items)
    adapted = [source for source in sources if source.kind in release.towers]
    spaces = [("adapted", manifest.adapted_space, adapted), ("encoded", manifest.encoded_space, sources)]
    for name, space, of in spaces:
        written[name] = write(
            vector_part(space.space_id),
            f"{name} vectors",
            chain.from_iterable(source.vectors(name, space) for source in of),
            sum(len(source.ids) for source in of),
            newer_only=not force,
        )
    if manifest.affinity.HasField("space"):
        space = manifest.affinity.space
        known = items.with_affinity()
        written["affinity"] = write(
            vector_part(space.space_id),
            "affinity vectors",
            known.vectors("affinity", space),
            len(known.ids),
            newer_only=not force,
        )
    for source in (users, items):
        _snapshot(source, index / NAMES[source.kind], force)
    counts = {
        "users": len(users.ids),
        "items": len(items.ids),
        "lent": {"users": len(users.lent), "items": len(items.lent)},
    }
    _seal(release, store, counts, clock())
    return written


def read_seal(store: Store, name: str) -> dict[str, Any]:
    """The JSON value that says that a space or schema is published; empty when it is not."""
    value = store.read_meta(name)
    return json.loads(value) if value else {}


def _seal(release: Release, store: Store, counts: Mapping[str, Any], published_at_ms: int) -> None:
    value = {"release_id": release.release_id, **counts, "published_at_ms": published_at_ms}
    manifest = release.manifest
    # The adapted space comes last: it alone is the release's own, so it says that all of the release is there.
    for name in (*_shared(manifest), space_meta(manifest.adapted_space.space_id)):
        store.write_meta(name, json.dumps(value).encode())


def _shared(manifest: records_pb2.Manifest) -> list[str]:
    """Names of the seals that releases of one schema and encoder have in common."""
    spaces = [manifest.encoded_space, *([manifest.affinity.space] if manifest.affinity.HasField("space") else [])]
    return [schema_meta(manifest.feature_schema_hash), *(space_meta(space.space_id) for space in spaces)]


def _is_published(release: Release, store: Store, index: Path) -> bool:
    """Whether all is there. Releases may share schema and encoder, and the last one's id is on what they share."""
    manifest = release.manifest
    return (
        read_seal(store, space_meta(manifest.adapted_space.space_id)).get("release_id") == release.release_id
        and all(store.read_meta(name) is not None for name in _shared(manifest))
        and all((index / name).is_dir() for name in NAMES.values())
    )


def _claim_features(store: Store, schema: str, force: bool) -> None:
    """Note whose schema the store's features are of; there is one features part, so others lose theirs."""
    held = (store.read_meta(SCHEMA) or b"").decode()
    if held and held != schema:
        if not force:
            raise PreconditionError(
                f"the store holds features of schema {held}, this release needs {schema} and would break those "
                "that serve from it: publish to another --store, or use --force once they are retired"
            )
        store.write_meta(schema_meta(held), None)
    store.write_meta(SCHEMA, schema.encode())


def _user_features(release: Release, dataset: Dataset) -> Records:
    """Users as the dataset knows them: the history is what their texts may know, true at its last event."""
    layout = release.user_layout
    ids = np.array([item.id for item in dataset.items], dtype=object)
    for row, user in enumerate(dataset.users):
        events = dataset.prompt_events(row)
        history = History(tuple(ids[dataset.event_item[events]]), dataset.event_rating[events])
        written_at_ms = int(dataset.event_time[events].max(initial=0)) * 1000
        blob = layout.encode(layout.row(user.features), written_at_ms=written_at_ms, history=history)
        yield EntityKey(USER, user.id), blob


def _item_features(release: Release, dataset: Dataset) -> Records:
    """Items as the dataset knows them, true at its last event."""
    layout = release.item_layout
    written_at_ms = int(dataset.event_time.max(initial=0)) * 1000
    for item in dataset.items:
        yield EntityKey(ITEM, item.id), layout.encode(layout.row(item.features), written_at_ms=written_at_ms)


@dataclass(frozen=True, slots=True)
class _Knowledge:
    """What a release knows of one kind of entity."""

    release: Release
    kind: int
    texts_by_id: dict[str, records_pb2.KnowledgeRecord]
    ids: list[str]
    """Row order of the arrays."""
    lent: frozenset[str]
    """Those of them whose vector is lent by others."""
    expires_at_ms: dict[str, int]
    """When vectors are stale, of those that will be."""

    @staticmethod
    def load(release: Release, kind: int) -> "_Knowledge":
        name = NAMES[kind]
        records = {record.id: record for record in read_knowledge(release.folder / "knowledge", name)}
        clusters = {record.id: record for record in read_clusters(release.folder / "knowledge", name)}
        ids = (release.folder / "vectors" / f"{name}_ids.txt").read_text().splitlines()
        lent = release.folder / "vectors" / f"{name}_lent.txt"
        borrowers = frozenset(lent.read_text().splitlines()) if lent.is_file() else frozenset()
        # Raw texts are the entities' own facts, which hold whatever becomes of the language model's.
        raw = any(ARMS[model.recipe].texts == "raw" for model in release.manifest.models if model.recipe)
        expiries = {} if raw else _expiries(records, clusters)
        return _Knowledge(release, kind, records, ids, borrowers, expiries)

    def with_affinity(self) -> "_Knowledge":
        """The items that have an affinity vector."""
        ids = (self.release.folder / "vectors" / "affinity_ids.txt").read_text().splitlines()
        return replace(self, ids=ids)

    def array(self, name: str) -> NDArray[np.float32]:
        file = "affinity.npy" if name == "affinity" else f"{NAMES[self.kind]}_{name}.npy"
        path = self.release.folder / "vectors" / file
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def texts(self) -> Records:
        for identity, record in self.texts_by_id.items():
            yield EntityKey(self.kind, identity), record.SerializeToString(deterministic=True)

    def vectors(self, name: str, space: records_pb2.VectorSpace) -> Records:
        """Vector parts, each true since the release was made and stale when the first text behind it is."""
        written_at_ms = self.release.manifest.created_at.ToMilliseconds()
        for identity, vector in zip(self.ids, self.array(name), strict=True):
            blobs = encode_vectors(
                vector[None],
                space.space_id,
                dtype=space.dtype,
                level=NEIGHBOUR if identity in self.lent else FULL,
                written_at_ms=written_at_ms,
                expires_at_ms=self.expires_at_ms.get(identity, NEVER),
            )
            yield EntityKey(self.kind, identity), blobs[0]


def _expiries(
    records: Mapping[str, records_pb2.KnowledgeRecord], clusters: Mapping[str, records_pb2.KnowledgeRecord]
) -> dict[str, int]:
    """When vectors are stale, milliseconds since the epoch: with their text, or with the first that they borrow."""
    lenders = {id_: record for id_, record in (*clusters.items(), *records.items()) if record.text}
    found = {}
    for identity, record in records.items():
        behind = [record] if record.text else [lenders[loan.id] for loan in record.loans if loan.id in lenders]
        ends = [text.expires_at.ToMilliseconds() for text in behind if text.HasField("expires_at")]
        if ends:
            found[identity] = min(ends)
    return found


def _snapshot(source: _Knowledge, folder: Path, force: bool) -> None:
    """Index the encoder's vectors: those that a caller can make of an unknown entity's text."""
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        index = FaissIndex.build(source.ids, source.array("encoded"))
        index.save(folder)
        index.close()
