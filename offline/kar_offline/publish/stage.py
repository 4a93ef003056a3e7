"""Owns publishing a release: features, texts and vectors into the store, vectors into the index, then the seal.

The seals are meta values, `space:<id>` of both vector spaces and `schema:<hash>` of the features, written after all
data: a killed publish is visible as not published. How many records of each kind are safely written is a meta value
too, `publish:<release id>`, so that running a killed publish again goes on from there.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.knowledge.records import read_clusters, read_knowledge
from kar_offline.stage_runner import StageResult, folder_hash
from kar_offline.train.arms import ARMS
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import PreconditionError
from kar_sidecar.features import History, schema_hash
from kar_sidecar.index.config import IndexConfig
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import make_current, read_current
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Store, schema_meta, space_meta, vector_part
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, NEVER, encode_vectors, now_ms

__all__ = ["ReleasedEntities", "expiries", "publish", "publish_release", "vector_parts"]

NEIGHBOUR: Final = int(records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR)
SCHEMA: Final = "features"
"""Name of the meta value that holds the hash of the one schema that the store's features are packed in, and, once that
changed, how often it did."""

CHECKPOINT: Final = 20_000
"""Records between two notes of how far a publish is: at most so many are offered to the store again."""
SAMPLED: Final = 200
"""Records that a publish looks for before it trusts that what was written is still there."""
SAMPLE_TIMEOUT_S: Final = 5.0
BURST_S: Final = 0.5
"""What a capped publish that fell behind may make up for at once, in seconds of its rate."""
SLEEP_S: Final = 0.01
"""Shortest pause of a capped publish."""

Records = Iterator[tuple[EntityKey, bytes]]


def publish(
    work: WorkFolder,
    release_id: str,
    store_url: str,
    *,
    aerospike: AerospikeSettings | None = None,
    force: bool = False,
    max_rate: int | None = None,
    indexing: IndexConfig | None = None,
    clock: Callable[[], int] = now_ms,
    progress: Progress | None = None,
) -> StageResult:
    """Publish a release of a work folder into the store that `store_url` names; does nothing when it is there.

    `aerospike` has the settings of such a store. `force` publishes again, and replaces features of another schema.
    `max_rate` caps records a second. `indexing` says how the index is built. `clock` gives milliseconds since the
    epoch. The report has `release_id`, `store`, `users` and `items` with a vector, how many of them are `lent`,
    `published_at_ms`, and records `written` now.

    Raises:
        NotFoundError: no such release.
        IntegrityError: a corrupt release or store.
        PreconditionError: the dataset, or what the store holds, is of another feature schema.
        InputError: the index does not reach the recall that `indexing` requires.
        UnavailableError: the store does not answer.
    """
    began = time.perf_counter()
    release = Release.load(work.releases, release_id)
    dataset = work.read(Dataset)
    index = work.index / release_id
    store = open_store(store_url, aerospike=aerospike)
    try:
        written = publish_release(
            release,
            dataset,
            store,
            index,
            dataset_hash=folder_hash(work.dataset),
            force=force,
            max_rate=max_rate,
            indexing=indexing,
            clock=clock,
            progress=progress,
        )
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
    dataset_hash: str = "",
    force: bool = False,
    max_rate: int | None = None,
    every: int = CHECKPOINT,
    indexing: IndexConfig | None = None,
    clock: Callable[[], int] = now_ms,
    progress: Progress | None = None,
) -> Mapping[str, int]:
    """Write all of a release and return the number of records written by kind of part; nothing when it was there.

    Records that the store already has, newer or the very same, are kept, and those that a killed run of the same
    release, dataset (`dataset_hash`) and `force` noted as written, each `every` records, are not even offered. See
    `publish` for the other arguments and for errors.
    """
    manifest = release.manifest
    schema = manifest.feature_schema_hash
    if schema_hash(dataset.schema) != schema:
        raise PreconditionError(f"the dataset has another feature schema than {release.folder}: export a release of it")
    if not force and _is_published(release, store, index):
        return {}
    claim = _claim_features(store, schema, force)
    users, items = (ReleasedEntities.load(release, kind) for kind in (USER, ITEM))
    # First, since an index that does not reach its recall ends the publish.
    _snapshots((users, items), index, indexing or IndexConfig(), clock(), force)
    loads = _loads(release, dataset, users, items, store, force)
    of = {"release_id": release.release_id, "dataset": dataset_hash, "force": force, "claim": claim}
    checkpoint = _Checkpoint.read(store, publish_meta(release.release_id), of)
    shown = progress or Progress(disable=True)
    written = {load.name: _write(load, store, checkpoint, shown, every, max_rate) for load in loads}
    counts = {
        "users": len(users.ids),
        "items": len(items.ids),
        "lent": {"users": len(users.lent), "items": len(items.lent)},
    }
    _seal(release, store, counts, clock())
    return written


def publish_meta(release_id: str) -> str:
    """Name of the meta value that says how far the publish of a release is; absent when none is under way."""
    return f"publish:{release_id}"


@dataclass(frozen=True, slots=True)
class _Load:
    """One kind of part of all its entities; `records` makes them anew, each time in the same order."""

    name: str
    part: str
    records: Callable[[], Iterable[tuple[EntityKey, bytes]]]
    total: int
    newer_only: bool


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """How many records of each load are safely written, kept in the store itself."""

    store: Store
    name: str
    of: Mapping[str, Any]
    """What is published; another publish's rows count for nothing."""
    rows: dict[str, int]

    @staticmethod
    def read(store: Store, name: str, of: Mapping[str, Any]) -> "_Checkpoint":
        held = json.loads(store.read_meta(name) or b"{}")
        return _Checkpoint(store, name, of, held["rows"] if held.get("of") == of else {})

    def note(self, load: str, rows: int) -> None:
        self.rows[load] = rows
        self.store.write_meta(self.name, json.dumps({"of": self.of, "rows": self.rows}).encode())


def _loads(
    release: Release, dataset: Dataset, users: "ReleasedEntities", items: "ReleasedEntities", store: Store, force: bool
) -> Iterator[_Load]:
    """All that a release has for a store, kind by kind."""
    manifest, sources = release.manifest, (users, items)
    yield _Load(
        "features",
        FEATURES,
        lambda: chain(_user_features(release, dataset), _item_features(release, dataset)),
        len(dataset.users) + len(dataset.items),
        newer_only=store.read_meta(schema_meta(manifest.feature_schema_hash)) is not None,
    )
    texts = sum(len(source.texts_by_id) for source in sources)
    yield _Load("texts", TEXT, lambda: chain(users.texts(), items.texts()), texts, newer_only=False)
    adapted = [source for source in sources if source.kind in release.towers]
    spaces = [("adapted", manifest.adapted_space, adapted), ("encoded", manifest.encoded_space, sources)]
    if manifest.affinity.HasField("space"):
        spaces.append(("affinity", manifest.affinity.space, [items.with_affinity()]))
    for name, space, of in spaces:
        yield _Load(
            name,
            vector_part(space.space_id),
            partial(_vectors, name, space, of),
            sum(len(source.ids) for source in of),
            newer_only=not force,
        )


def _vectors(name: str, space: records_pb2.VectorSpace, of: Iterable["ReleasedEntities"]) -> Records:
    return chain.from_iterable(source.vectors(name, space) for source in of)


def _write(
    load: _Load, store: Store, checkpoint: _Checkpoint, shown: Progress, every: int, max_rate: int | None
) -> int:
    """Write what a checkpoint does not have, and note it every so many records."""
    done = checkpoint.rows.get(load.name, 0)
    if not _still_there(load, store, done):
        done = 0
    if done == load.total:
        return 0
    stream = iter(shown.track(load.records(), load.total, description=load.name))
    for _ in islice(stream, done):
        pass
    if max_rate is not None:
        stream = paced(stream, max_rate)
    written = 0
    # One more than there are: the last slice asks beyond the end, so that the stream can tell when it has too few.
    for start in range(done, load.total + 1, every):
        written += store.write(load.part, islice(stream, every), newer_only=load.newer_only)
        checkpoint.note(load.name, min(start + every, load.total))
    return written


def _still_there(load: _Load, store: Store, rows: int) -> bool:
    """Whether the first of so many rows are in the store: meanwhile the part may have been removed as a whole."""
    keys = [key for key, _ in islice(load.records(), min(rows, SAMPLED))]
    return all(record[0] is not None for record in store.read(keys, [load.part], SAMPLE_TIMEOUT_S))


def paced(
    records: Records,
    per_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Records:
    """The same records, at most `per_s` a second but for what was missed in the last `BURST_S`."""
    due_s = clock()
    for record in records:
        now_s = clock()
        if due_s - now_s >= SLEEP_S:
            sleep(due_s - now_s)
        due_s = max(due_s, now_s - BURST_S) + 1 / per_s
        yield record


def read_seal(store: Store, name: str) -> dict[str, Any]:
    """The JSON value that says that a space or schema is published; empty when it is not."""
    value = store.read_meta(name)
    return json.loads(value) if value else {}


def _seal(release: Release, store: Store, counts: Mapping[str, Any], published_at_ms: int) -> None:
    value = {"release_id": release.release_id, **counts, "published_at_ms": published_at_ms}
    manifest = release.manifest
    for name in _shared(manifest):
        store.write_meta(name, json.dumps(value).encode())
    store.write_meta(publish_meta(release.release_id), None)
    # The adapted space comes last: it alone is the release's own, so it says that all of the release is there.
    store.write_meta(space_meta(manifest.adapted_space.space_id), json.dumps(value).encode())


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
        and all(read_current(index / name) is not None for name in EntityKind)
    )


def _claim_features(store: Store, schema: str, force: bool) -> str:
    """Note whose schema the store's features are of; there is one features part, so others lose theirs.

    Returns what was noted. It is another one after each change of schema: what a killed publish wrote before is gone,
    even where a release of its own schema has claimed the features again.
    """
    claim = (store.read_meta(SCHEMA) or b"").decode()
    held, _, changes = claim.partition(" ")
    if held == schema:
        return claim
    claim = schema
    if held:
        if not force:
            raise PreconditionError(
                f"the store holds features of schema {held}, this release needs {schema} and would break those "
                "that serve from it: publish to another --store, or use --force once they are retired"
            )
        store.write_meta(schema_meta(held), None)
        claim = f"{schema} {int(changes or 0) + 1}"
    store.write_meta(SCHEMA, claim.encode())
    return claim


def _user_features(release: Release, dataset: Dataset) -> Records:
    """Users as the dataset knows them: the history is what their texts may know, true at its last event."""
    layout = release.user_layout
    ids = np.array([item.id for item in dataset.items], dtype=object)
    for row, user in enumerate(dataset.users):
        events = dataset.written_from(row)
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
class ReleasedEntities:
    """What a release knows of one kind of entity."""

    release: Release
    kind: EntityKind
    texts_by_id: dict[str, records_pb2.KnowledgeRecord]
    ids: list[str]
    """Row order of the arrays."""
    lent: frozenset[str]
    """Those of them whose vector is lent by others."""
    expires_at_ms: dict[str, int]
    """When vectors are stale, of those that will be."""

    @staticmethod
    def load(release: Release, kind: EntityKind) -> "ReleasedEntities":
        """Read it; errors as of `read_knowledge`."""
        records = {record.id: record for record in read_knowledge(release.folder / "knowledge", kind)}
        clusters = {record.id: record for record in read_clusters(release.folder / "knowledge", kind)}
        ids = (release.folder / "vectors" / f"{kind}_ids.txt").read_text().splitlines()
        lent = release.folder / "vectors" / f"{kind}_lent.txt"
        borrowers = frozenset(lent.read_text().splitlines()) if lent.is_file() else frozenset()
        # Raw texts are the entities' own facts, which hold whatever becomes of the language model's.
        raw = any(ARMS[model.recipe].texts == "raw" for model in release.manifest.models if model.recipe)
        ends = {} if raw else expiries(records, clusters)
        return ReleasedEntities(release, kind, records, ids, borrowers, ends)

    def with_affinity(self) -> "ReleasedEntities":
        """The items that have an affinity vector."""
        ids = (self.release.folder / "vectors" / "affinity_ids.txt").read_text().splitlines()
        return replace(self, ids=ids)

    def array(self, name: str) -> NDArray[np.float32]:
        """The "adapted", "encoded" or "affinity" vectors [n, dim], mapped."""
        file = "affinity.npy" if name == "affinity" else f"{self.kind}_{name}.npy"
        path = self.release.folder / "vectors" / file
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def texts(self) -> Records:
        """Text parts."""
        for identity, record in self.texts_by_id.items():
            yield EntityKey(self.kind, identity), record.SerializeToString(deterministic=True)

    def vectors(self, name: str, space: records_pb2.VectorSpace) -> Records:
        """Vector parts, each true since the release was made and stale when `expiries` says so, if ever."""
        written_at_ms = self.release.manifest.created_at.ToMilliseconds()
        return vector_parts(self.kind, self.ids, self.array(name), self.lent, self.expires_at_ms, space, written_at_ms)


def vector_parts(
    kind: EntityKind,
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    lent: Collection[str],
    expires_at_ms: Mapping[str, int],
    space: records_pb2.VectorSpace,
    written_at_ms: int,
) -> Records:
    """Parts of vectors [n, dim] of n entities of one kind, each at its level and with its expiry, if it has one."""
    for identity, vector in zip(ids, vectors, strict=True):
        blobs = encode_vectors(
            vector[None],
            space.space_id,
            dtype=space.dtype,
            level=NEIGHBOUR if identity in lent else FULL,
            written_at_ms=written_at_ms,
            expires_at_ms=expires_at_ms.get(identity, NEVER),
        )
        yield EntityKey(kind, identity), blobs[0]


def expiries(
    records: Mapping[str, records_pb2.KnowledgeRecord], clusters: Mapping[str, records_pb2.KnowledgeRecord]
) -> dict[str, int]:
    """When vectors are stale, milliseconds since the epoch: with their text, or with the first that their loans name.

    Vectors that are lent by content have no record, and are never stale.
    """
    lenders = {id_: record for id_, record in (*clusters.items(), *records.items()) if record.text}
    found = {}
    for identity, record in records.items():
        behind = [record] if record.text else [lenders[loan.id] for loan in record.loans if loan.id in lenders]
        ends = [text.expires_at.ToMilliseconds() for text in behind if text.HasField("expires_at")]
        if ends:
            found[identity] = min(ends)
    return found


def _snapshots(sources: Sequence[ReleasedEntities], index: Path, config: IndexConfig, at_ms: int, force: bool) -> None:
    """Index the encoder's vectors, those that a caller can make of an unknown entity's text: of all kinds or none."""
    roots = {index / source.kind: source for source in sources}
    built = {
        root: FaissIndex.build(source.ids, source.array("encoded"), config)
        for root, source in roots.items()
        if force or read_current(root) is None
    }
    for root, made in built.items():
        space_id = roots[root].release.manifest.encoded_space.space_id
        make_current(root, made.save(root, space_id=space_id), at_ms)
        made.close()
