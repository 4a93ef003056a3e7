"""Owns the entities of a release: their texts, vectors and expiry times, as records for a store."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.knowledge.records import read_clusters, read_knowledge
from kar_offline.train.arms import ARMS
from kar_sidecar.entities import EntityKind
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import EntityKey
from kar_sidecar.store.records import FULL, NEVER, encode_vectors

__all__ = ["EntityRecords", "ReleasedEntities", "expiry_times", "vector_records"]

NEIGHBOUR: Final = int(records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR)

EntityRecords = Iterator[tuple[EntityKey, bytes]]
"""Encoded values of one part of a store, by entity."""


@dataclass(frozen=True)
class ReleasedEntities:
    """The entities of one kind in a release."""

    release: Release
    kind: EntityKind
    texts_by_id: dict[str, records_pb2.KnowledgeRecord]
    ids: list[str]
    """Ids in the row order of the arrays."""
    imputed_ids: frozenset[str]
    """Ids of entities whose vector was imputed."""
    expires_at_ms: dict[str, int]
    """Expiry times by id, milliseconds since the epoch; entities that never expire are left out."""
    _arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def load(release: Release, kind: EntityKind) -> "ReleasedEntities":
        """Read the entities of one kind.

        Raises:
            PreconditionError: the release holds no knowledge of this kind.
            IntegrityError: a line is not a knowledge record.
        """
        records = {record.id: record for record in read_knowledge(release.folder / "knowledge", kind)}
        clusters = {record.id: record for record in read_clusters(release.folder / "knowledge", kind)}
        ids = (release.folder / "vectors" / f"{kind}_ids.txt").read_text().splitlines()
        imputed_file = release.folder / "vectors" / f"{kind}_lent.txt"
        imputed_ids = frozenset(imputed_file.read_text().splitlines()) if imputed_file.is_file() else frozenset()
        # Raw texts are an entity's own facts and do not expire with texts of the language model.
        reads_raw_texts = any(ARMS[model.recipe].texts == "raw" for model in release.manifest.models if model.recipe)
        expires_at_ms = {} if reads_raw_texts else expiry_times(records, clusters)
        return ReleasedEntities(release, kind, records, ids, imputed_ids, expires_at_ms)

    def with_affinity(self) -> "ReleasedEntities":
        """The items that have an affinity vector."""
        ids = (self.release.folder / "vectors" / "affinity_ids.txt").read_text().splitlines()
        return replace(self, ids=ids)

    def vectors(self, name: str) -> NDArray[np.float32]:
        """The "adapted", "encoded" or "affinity" vectors [n, D], memory-mapped once."""
        if name not in self._arrays:
            file = "affinity.npy" if name == "affinity" else f"{self.kind}_{name}.npy"
            self._arrays[name] = np.load(self.release.folder / "vectors" / file, mmap_mode="r", allow_pickle=False)
        return self._arrays[name]

    def text_records(self) -> EntityRecords:
        """Records of the part `text`."""
        for id_, record in self.texts_by_id.items():
            yield EntityKey(self.kind, id_), record.SerializeToString(deterministic=True)

    def vector_records(self, name: str, space: records_pb2.VectorSpace) -> EntityRecords:
        """Records of the part of a vector space, written at the time at which the release was made."""
        written_at_ms = self.release.manifest.created_at.ToMilliseconds()
        return vector_records(
            self.kind, self.ids, self.vectors(name), self.imputed_ids, self.expires_at_ms, space, written_at_ms
        )


def vector_records(
    kind: EntityKind,
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    imputed_ids: Collection[str],
    expires_at_ms: Mapping[str, int],
    space: records_pb2.VectorSpace,
    written_at_ms: int,
) -> EntityRecords:
    """Records of the part of a vector space.

    Args:
        kind: Kind of the n entities.
        ids: Their ids.
        vectors: Their vectors [n, D].
        imputed_ids: Ids of entities whose vector was imputed, which get the level NEIGHBOUR.
        expires_at_ms: Expiry times by id, if any.
        space: The vector space.
        written_at_ms: Milliseconds since the epoch.
    """
    for id_, vector in zip(ids, vectors, strict=True):
        blobs = encode_vectors(
            vector[None],
            space.space_id,
            dtype=space.dtype,
            level=NEIGHBOUR if id_ in imputed_ids else FULL,
            written_at_ms=written_at_ms,
            expires_at_ms=expires_at_ms.get(id_, NEVER),
        )
        yield EntityKey(kind, id_), blobs[0]


def expiry_times(
    records: Mapping[str, records_pb2.KnowledgeRecord], clusters: Mapping[str, records_pb2.KnowledgeRecord]
) -> dict[str, int]:
    """Expiry times of vectors by id, milliseconds since the epoch; entities that never expire are left out.

    A vector expires with its text. A vector imputed from the neighbours of a record expires with the first of their
    texts. A vector imputed from similar facts has no record, and never expires.

    Args:
        records: Records of the entities, by id.
        clusters: Records of the clusters, by id.
    """
    with_text = {id_: record for id_, record in (*clusters.items(), *records.items()) if record.text}
    times = {}
    for id_, record in records.items():
        if record.text:
            sources = [record]
        else:
            sources = [with_text[neighbour.id] for neighbour in record.loans if neighbour.id in with_text]
        expiries = [source.expires_at.ToMilliseconds() for source in sources if source.HasField("expires_at")]
        if expiries:
            times[id_] = min(expiries)
    return times
