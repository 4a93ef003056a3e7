"""Owns the index snapshots of a release: one index of encoded vectors per kind of entity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.publish.released_entities import ReleasedEntities
from kar_sidecar.index.config import IndexConfig
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import make_current, open_snapshot, read_current

__all__ = ["build_snapshots", "update_snapshot"]

INDEX_OPTIONS: Final = ("kind", "storage", "lists", "links", "ef_construction")
"""Fields of a snapshot's record that say how the index was built."""


def build_snapshots(
    entities: Sequence[ReleasedEntities], index: Path, config: IndexConfig, at_ms: int, *, rebuild: bool
) -> None:
    """Build the index of each kind and make the snapshots current, all or none.

    Encoded vectors are indexed, since callers can encode the text of an unknown entity themselves.

    Args:
        entities: The entities of a release, one entry per kind.
        index: The release's folder of snapshots.
        config: How to build.
        at_ms: Time from which the snapshots are current, milliseconds since the epoch.
        rebuild: Whether to replace a snapshot that exists.

    Raises:
        InputError: an index does not reach the recall that `config` requires.
    """
    built = [
        (released, FaissIndex.build(released.ids, released.vectors("encoded"), config))
        for released in entities
        if rebuild or read_current(index / released.kind) is None
    ]
    for released, faiss_index in built:
        folder = index / released.kind
        space_id = released.release.manifest.encoded_space.space_id
        make_current(folder, faiss_index.save(folder, space_id=space_id), at_ms)
        faiss_index.close()


def update_snapshot(
    released: ReleasedEntities, fresh_vectors: Mapping[str, NDArray[np.float32]], index: Path, at_ms: int
) -> None:
    """Build one kind's index again with fresh vectors, with the options of the current snapshot.

    A snapshot is named by its content, so the same vectors change nothing.

    Args:
        released: The entities of one kind in the release.
        fresh_vectors: Encoded vectors [D] by id, of new entities or replacing released ones.
        index: The release's folder of snapshots.
        at_ms: Time from which the snapshot is current, milliseconds since the epoch.
    """
    folder = index / released.kind
    vectors = dict(zip(released.ids, released.vectors("encoded"), strict=True)) | dict(fresh_vectors)
    current = read_current(folder)
    config = IndexConfig()
    if current:
        snapshot = open_snapshot(folder / current.snapshot_id, verify=False)
        snapshot.lock.close()
        options = {name: snapshot.record[name] for name in INDEX_OPTIONS if name in snapshot.record}
        config = IndexConfig(**options, recall=snapshot.record["recall"]["required"])
    faiss_index = FaissIndex.build(list(vectors), np.stack(list(vectors.values())), config)
    snapshot_id = faiss_index.save(folder, space_id=released.release.manifest.encoded_space.space_id)
    faiss_index.close()
    if current is None or current.snapshot_id != snapshot_id:
        make_current(folder, snapshot_id, at_ms)
