"""Owns publishing fresh knowledge: texts and vectors of a work folder that a published release lacks.

Entities whose text, vector, imputation or expiry time differs from the release's get their text, their encoded and
adapted vectors and, if they are items, their affinity vector. The release's own adaptor and text components make the
vectors, so old and new ones can be compared. The nearest-neighbour index is built again. Records that the store holds
already are not written. Serving goes on meanwhile: each part of an entity is replaced in one step.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_kernels import FrozenAdaptor, HybridExpertAdaptor, Tower
from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.vector_files import Encoding
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.publish.feature_records import current_features
from kar_offline.publish.index_snapshots import update_snapshot
from kar_offline.publish.part_writes import dated_after, write_changed
from kar_offline.publish.release_target import ReleaseTarget
from kar_offline.publish.released_entities import ReleasedEntities, expiry_times, vector_records
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import IntegrityError
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Store, vector_part
from kar_sidecar.store.records import now_ms

__all__ = ["publish_knowledge"]

CHUNK_ENTITIES: Final = 4096
"""Entities whose vectors are adapted and compared with the store's at once; limits memory."""


@dataclass(frozen=True, slots=True)
class _FreshEntities:
    """n entities of one kind whose knowledge differs from the release's."""

    ids: list[str]
    encoded: NDArray[np.float32]
    """Encoded vectors [n, D]."""
    imputed_ids: Collection[str]
    expires_at_ms: Mapping[str, int]
    records: list[records_pb2.KnowledgeRecord]
    """Records that differ from the release's."""


def publish_knowledge(
    target: ReleaseTarget,
    store: Store,
    index: Path,
    *,
    dataset: Dataset,
    knowledge: Knowledge,
    encoding: Encoding,
    changed_entities: Collection[EntityKey] = (),
    clock: Callable[[], int] = now_ms,
) -> dict[str, int]:
    """Write fresh knowledge; returns the number of written records by part.

    Args:
        target: The release, published in `store`.
        store: The store.
        index: The release's folder of index snapshots.
        dataset: The dataset of the work folder.
        knowledge: Its knowledge.
        encoding: Its vectors.
        changed_entities: Entities whose features and, for users, histories are written too.
        clock: Gives milliseconds since the epoch; vectors are dated with it.

    Raises:
        IntegrityError: the work folder's vectors do not fit its dataset.
        UnavailableError: the store does not answer.
    """
    features = current_features(target.release, dataset, changed_entities)
    written = {"features": write_changed(store, FEATURES, features, dated_after)}
    at_ms = clock()
    for part in ("adapted", "encoded", *(["affinity"] if target.affinity else []), "texts"):
        written[part] = 0
    adaptor = HybridExpertAdaptor.load(target.release.folder / "adaptor.safetensors").freeze()
    for kind in (USER, ITEM):
        ids = [entity.id for entity in dataset.entities[kind]]
        fresh = _fresh_entities(target.entities[kind], ids, knowledge, encoding)
        for part, count in _write_vectors(target, adaptor, store, kind, fresh, at_ms).items():
            written[part] += count
        texts = ((EntityKey(kind, record.id), record.SerializeToString(deterministic=True)) for record in fresh.records)
        written["texts"] += store.write(TEXT, texts)
        if fresh.ids:
            update_snapshot(target.entities[kind], dict(zip(fresh.ids, fresh.encoded, strict=True)), index, at_ms)
    return written


def _fresh_entities(
    released: ReleasedEntities, ids: list[str], knowledge: Knowledge, encoding: Encoding
) -> _FreshEntities:
    """Entities whose knowledge in the work folder differs from the release's; `ids` are all entities of the dataset."""
    kind = released.kind
    header, vectors = encoding.header(f"knowledge_{kind}"), encoding.vectors(f"knowledge_{kind}")
    if header.ids != ids:
        raise IntegrityError(f"{encoding.folder} does not fit the dataset: run `kar encode` again")
    records = knowledge.records[kind]
    expires_at_ms = expiry_times(records, knowledge.clusters[kind])
    released_vectors = released.vectors("encoded")
    released_row_of = {id_: row for row, id_ in enumerate(released.ids)}

    def differs(row: int, id_: str) -> bool:
        return (
            id_ not in released_row_of
            or records.get(id_) != released.texts_by_id.get(id_)
            or expires_at_ms.get(id_) != released.expires_at_ms.get(id_)
            or not np.array_equal(vectors[row], released_vectors[released_row_of[id_]])
        )

    rows = [
        row
        for row, (id_, digest) in enumerate(zip(ids, header.text_sha256, strict=True))
        if digest and differs(row, id_)
    ]
    changed_records = [record for id_, record in records.items() if record != released.texts_by_id.get(id_)]
    return _FreshEntities(
        [ids[row] for row in rows], np.asarray(vectors[rows]), set(header.imputed), expires_at_ms, changed_records
    )


def _write_vectors(
    target: ReleaseTarget,
    adaptor: FrozenAdaptor,
    store: Store,
    kind: EntityKind,
    fresh: _FreshEntities,
    at_ms: int,
) -> dict[str, int]:
    """Write the vectors of fresh entities of one kind; returns the number of written records by part."""
    manifest = target.release.manifest
    written = dict.fromkeys(("adapted", "encoded", "affinity"), 0)
    for start in range(0, len(fresh.ids), CHUNK_ENTITIES):
        chunk = slice(start, start + CHUNK_ENTITIES)
        ids, encoded = fresh.ids[chunk], fresh.encoded[chunk]
        vectors = {"encoded": (manifest.encoded_space, encoded)}
        if kind in target.release.towers:
            vectors["adapted"] = (manifest.adapted_space, _adapted(adaptor, kind, encoded))
        if target.affinity and kind == ITEM:
            vectors["affinity"] = (target.affinity.space, target.affinity.vectors(ids, encoded))
        for part, (space, rows) in vectors.items():
            records = vector_records(kind, ids, rows, fresh.imputed_ids, fresh.expires_at_ms, space, at_ms)
            written[part] += write_changed(store, vector_part(space.space_id), records)
    return {part: count for part, count in written.items() if count}


def _adapted(adaptor: FrozenAdaptor, kind: EntityKind, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Adapted vectors [n, K] of encoded vectors [n, D]."""
    tower: Tower = "user" if kind == USER else "item"
    rows = torch.from_numpy(np.ascontiguousarray(encoded))
    return adaptor.adapt({tower: (rows, torch.ones(len(rows), dtype=torch.bool))})[tower].numpy()
