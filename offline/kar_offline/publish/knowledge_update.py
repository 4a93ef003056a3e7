"""Owns publishing fresh knowledge into the spaces of a published release: what a work folder knows and it does not.

Entities whose text, vector or loan is another than the release's get their text, their encoded and adapted vectors
and, for items, their affinity vector; the release's own adaptor and text components make them, and the index is built
anew. Whatever the store holds already stays, so publishing again writes nothing. Readers go on meanwhile: each part of
an entity changes in one step.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_kernels import FrozenAdaptor, HybridExpertAdaptor, Tower
from kar_offline.dataset.dataset import Dataset
from kar_offline.knowledge.records import read_clusters, read_knowledge
from kar_offline.publish.stage import ReleasedEntities, expiries, vector_parts
from kar_offline.train.arms import ARMS
from kar_offline.train.knowledge_inputs import TEXT as TEXT_SEGMENT
from kar_offline.train.principal_components import Components
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import IntegrityError, PreconditionError
from kar_sidecar.features import History, schema_hash
from kar_sidecar.index.config import IndexConfig
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import make_current, open_snapshot, read_current
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Store, space_meta, vector_part
from kar_sidecar.store.records import HEADER, in_batches, now_ms, read_header

__all__ = ["check_published", "publish_knowledge"]

CHUNK: Final = 4096
"""Entities whose vectors are adapted and compared with the store's together; bounds memory."""
ROUNDING: Final = 1e-4
"""What components of the same vectors may differ by."""
READ_BATCH: Final = 1_000
"""Records that are compared with the store's at once."""
READ_TIMEOUT_S: Final = 5.0
INDEX_OPTIONS: Final = ("kind", "storage", "lists", "links", "ef_construction")
"""What a snapshot's record says of how it was built."""

Blobs = Iterator[tuple[EntityKey, bytes]]


@dataclass(frozen=True, slots=True)
class _Fresh:
    """Entities of one kind whose knowledge is not what a release holds; n of them."""

    released: ReleasedEntities
    """What the release holds of the kind."""
    ids: list[str]
    encoded: NDArray[np.float32]  # [n, D]
    lent: set[str]
    expires_at_ms: dict[str, int]
    records: list[records_pb2.KnowledgeRecord]
    """Those that are not the release's."""

    @property
    def kind(self) -> EntityKind:
        return self.released.kind


def publish_knowledge(
    work: WorkFolder,
    release: Release,
    store: Store,
    *,
    named: Collection[EntityKey] = (),
    clock: Callable[[], int] = now_ms,
) -> dict[str, int]:
    """Write what is fresh, and return the number of records written by kind of part.

    Args:
        work: Holds `dataset`, `knowledge` and `encoding`.
        release: A release that is published in `store`.
        store: Where to.
        named: Entities whose features and, for users, whole history are written, where newer.
        clock: Gives milliseconds since the epoch: what is written is true from then on.

    Raises:
        PreconditionError: the release is not published there, or does not belong to the work folder's vectors.
        IntegrityError: the release or the work folder's stages are corrupt.
        UnavailableError: the store does not answer.
    """
    dataset = work.read(Dataset)
    check_published(work, dataset, release, store)
    manifest = release.manifest
    written = {"features": _write_changed(store, FEATURES, _features(release, dataset, named), _later)}
    at_ms = clock()
    adaptor = HybridExpertAdaptor.load(release.folder / "adaptor.safetensors").freeze()
    affinity = _Affinity.of(release)
    for part in ("adapted", "encoded", *(["affinity"] if affinity else []), "texts"):
        written[part] = 0
    for kind in (USER, ITEM):
        fresh = _fresh(work, release, dataset, kind)
        for start in range(0, len(fresh.ids), CHUNK):
            some = slice(start, start + CHUNK)
            vectors = {"encoded": (manifest.encoded_space, fresh.encoded[some])}
            if kind in release.towers:
                vectors["adapted"] = (manifest.adapted_space, _adapted(adaptor, kind, fresh.encoded[some]))
            if affinity and kind == ITEM:
                vectors["affinity"] = (affinity.space, affinity.vectors(fresh.ids[some], fresh.encoded[some]))
            for part, (space, rows) in vectors.items():
                blobs = vector_parts(kind, fresh.ids[some], rows, fresh.lent, fresh.expires_at_ms, space, at_ms)
                written[part] += _write_changed(store, vector_part(space.space_id), blobs)
        texts = ((EntityKey(kind, one.id), one.SerializeToString(deterministic=True)) for one in fresh.records)
        written["texts"] += store.write(TEXT, texts)
        if fresh.ids:
            _index(work.index / release.release_id / kind, fresh, at_ms)
    return written


def check_published(work: WorkFolder, dataset: Dataset, release: Release, store: Store) -> None:
    """Check that fresh vectors of a work folder belong into a release's spaces, and that those are in the store.

    Raises:
        PreconditionError: they do not, or are not; the text says why.
    """
    manifest = release.manifest
    if store.read_meta(space_meta(manifest.adapted_space.space_id)) is None:
        raise PreconditionError(f"release {release.release_id} is not in this store: run `kar publish` first")
    if any(ARMS[model.recipe].texts not in ("", "knowledge") for model in manifest.models if model.recipe):
        raise PreconditionError(f"release {release.release_id} reads raw texts, not knowledge: name another --release")
    header = work.encoding / "knowledge_item.json"
    if not header.is_file():
        raise PreconditionError(f"{header} does not exist: run `kar encode` first")
    if (encoder_id := json.loads(header.read_text())["encoder_id"]) != manifest.encoder_id:
        raise PreconditionError(
            f"{work.encoding} is by {encoder_id}, release {release.release_id} by {manifest.encoder_id}: encode "
            "with the release's encoder, or export a new release"
        )
    if schema_hash(dataset.schema) != manifest.feature_schema_hash:
        raise PreconditionError(f"the dataset has another feature schema than {release.folder}: export a release of it")
    _Affinity.of(release)


def _features(release: Release, dataset: Dataset, named: Collection[EntityKey]) -> Blobs:
    """Features of some entities as the dataset knows them, users' with their whole history, true at their last event.

    Items are true at the dataset's last event, and so are users without any.
    """
    latest = int(dataset.event_time.max(initial=0))
    ids = np.array([item.id for item in dataset.items], dtype=object)
    layout = release.item_layout
    for item in dataset.items:
        if (key := EntityKey(ITEM, item.id)) in named:
            yield key, layout.encode(layout.row(item.features), written_at_ms=latest * 1000)
    layout = release.user_layout
    longest = max(AFFINITY_EVENTS, dataset.schema.history_length)
    for row, user in enumerate(dataset.users):
        if (key := EntityKey(USER, user.id)) in named:
            first, end = int(dataset.offsets[row]), int(dataset.offsets[row + 1])
            events = slice(max(first, end - longest), end)
            history = History(tuple(ids[dataset.event_item[events]]), dataset.event_rating[events])
            written_at_ms = int(dataset.event_time[events].max(initial=0) or latest) * 1000
            yield key, layout.encode(layout.row(user.features), written_at_ms=written_at_ms, history=history)


def _fresh(work: WorkFolder, release: Release, dataset: Dataset, kind: EntityKind) -> _Fresh:
    """What a work folder knows of one kind of entities otherwise than a release."""
    about = json.loads((work.encoding / f"knowledge_{kind}.json").read_text())
    ids, digests, lent = about["ids"], about["text_sha256"], set(about.get("lent", ()))
    if ids != [entity.id for entity in (dataset.users if kind == USER else dataset.items)]:
        raise IntegrityError(f"{work.encoding} does not fit the dataset: run `kar encode` again")
    encoded = np.load(work.encoding / f"knowledge_{kind}.npy", mmap_mode="r")
    records = {record.id: record for record in read_knowledge(work.knowledge, kind)}
    clusters = {record.id: record for record in read_clusters(work.knowledge, kind)}
    ends = expiries(records, clusters)
    released = ReleasedEntities.load(release, kind)
    former, vectors = released.texts_by_id, released.array("encoded")
    row_of = {id_: row for row, id_ in enumerate(released.ids)}
    rows = [
        row
        for row, (id_, digest) in enumerate(zip(ids, digests, strict=True))
        if digest
        and (
            id_ not in row_of
            or records.get(id_) != former.get(id_)
            or ends.get(id_) != released.expires_at_ms.get(id_)
            or not np.array_equal(encoded[row], vectors[row_of[id_]])
        )
    ]
    changed = [record for id_, record in records.items() if record != former.get(id_)]
    return _Fresh(released, [ids[row] for row in rows], np.asarray(encoded[rows]), lent, ends, changed)


def _adapted(adaptor: FrozenAdaptor, kind: EntityKind, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
    tower: Tower = "user" if kind == USER else "item"
    rows = torch.from_numpy(np.ascontiguousarray(encoded))
    return adaptor.adapt({tower: (rows, torch.ones(len(rows), dtype=torch.bool))})[tower].numpy()


@dataclass(frozen=True, slots=True)
class _Affinity:
    """How a release's items get affinity vectors; segments that do not come from texts stay as they were exported.

    Text components are those of the vectors that the release was trained with.
    """

    space: records_pb2.VectorSpace
    components: Components
    text: slice
    """Where the segment of texts lies in a vector."""
    row_of: dict[str, int]
    exported: NDArray[np.float32]  # [items, V]

    @staticmethod
    def of(release: Release) -> "_Affinity | None":
        """None where the release has no affinity vectors, or none of texts.

        Raises:
            PreconditionError: they were not made of the release's encoded vectors.
        """
        start, text = 0, None
        for segment in release.manifest.affinity.segments:
            if segment.name == TEXT_SEGMENT:
                text = slice(start, start + segment.dim)
            start += segment.dim
        if text is None or not release.manifest.affinity.HasField("space"):
            return None
        folder = release.folder / "vectors"
        encoded = torch.from_numpy(np.load(folder / "item_encoded.npy", allow_pickle=False))
        components = Components.of(encoded, text.stop - text.start)
        ids = (folder / "affinity_ids.txt").read_text().splitlines()
        row_of = {id_: row for row, id_ in enumerate(ids)}
        exported = np.load(folder / "affinity.npy", allow_pickle=False)
        # Items whose vector would be 0 were not exported.
        rows = [row_of.get(id_, -1) for id_ in (folder / "item_ids.txt").read_text().splitlines()]
        trained = np.pad(exported[:, text], ((0, 1), (0, 0)))[rows]
        if not np.allclose(components.project(encoded).numpy(), trained, atol=ROUNDING):
            raise PreconditionError(
                f"release {release.release_id} was exported from other vectors than its model was trained on: train "
                "and export again"
            )
        return _Affinity(release.manifest.affinity.space, components, text, row_of, exported)

    def vectors(self, ids: Sequence[str], encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """Affinity vectors [n, V] of items with encoded vectors [n, D]; what no text tells of new items is 0."""
        vectors = np.zeros((len(ids), self.exported.shape[1]), np.float32)
        for at, id_ in enumerate(ids):
            if (row := self.row_of.get(id_)) is not None:
                vectors[at] = self.exported[row]
        vectors[:, self.text] = self.components.project(torch.from_numpy(np.ascontiguousarray(encoded))).numpy()
        return vectors


def _index(root: Path, fresh: _Fresh, at_ms: int) -> None:
    """Build the index anew with what is fresh, in the way it was built, and have readers use it from now on.

    A snapshot is named by its content: the same once more changes nothing.
    """
    released = fresh.released
    vectors = dict(zip(released.ids, released.array("encoded"), strict=True))
    vectors |= zip(fresh.ids, fresh.encoded, strict=True)
    current = read_current(root)
    config = IndexConfig()
    if current:
        held = open_snapshot(root / current.snapshot_id, verify=False)
        held.lock.close()
        options = {name: held.record[name] for name in INDEX_OPTIONS if name in held.record}
        config = IndexConfig(**options, recall=held.record["recall"]["required"])
    index = FaissIndex.build(list(vectors), np.stack(list(vectors.values())), config)
    snapshot_id = index.save(root, space_id=released.release.manifest.encoded_space.space_id)
    index.close()
    if current is None or current.snapshot_id != snapshot_id:
        make_current(root, snapshot_id, at_ms)


def _write_changed(
    store: Store, part: str, blobs: Blobs, stamp: Callable[[bytes, bytes], bytes] = lambda blob, stored: blob
) -> int:
    """Write what the store does not hold already, but for the time at which it was written, where that is newer.

    `stamp` may give what is written, instead of a blob, in place of another that is stored.
    """
    written = 0
    for batch in in_batches(blobs, READ_BATCH):
        held = store.read(list(batch), [part], READ_TIMEOUT_S)
        new = [
            (key, blob if stored is None else stamp(blob, stored))
            for (key, blob), (stored,) in zip(batch.items(), held, strict=True)
            if stored is None or not _same(blob, stored)
        ]
        written += store.write(part, new, newer_only=True)
    return written


def _later(blob: bytes, stored: bytes) -> bytes:
    """Features, dated after stored ones that are of the same second or before.

    They are as old as a user's last event. An event that came late makes them no younger, and must be seen too.
    """
    try:
        mine, theirs = read_header(blob), read_header(stored)
    except IntegrityError:
        return blob
    if theirs.written_at_ms // 1000 > mine.written_at_ms // 1000:
        return blob
    dated = replace(mine, written_at_ms=max(mine.written_at_ms, theirs.written_at_ms + 1))
    return dated.seal(blob[HEADER.itemsize :])


def _same(blob: bytes, stored: bytes) -> bool:
    try:
        mine, theirs = read_header(blob), read_header(stored)
    except IntegrityError:
        return False
    return (
        mine == replace(theirs, written_at_ms=mine.written_at_ms)
        and blob[HEADER.itemsize :] == stored[HEADER.itemsize :]
    )
