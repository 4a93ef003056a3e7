"""Owns the stage `publish`: a release into the store and the index.

Index snapshots are built first, since an index that misses its recall ends the publish. Then features, texts and
vectors are written, and the seals last: until then the release counts as not published. A checkpoint in the store
lets the next run continue where a killed one stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from rich.progress import Progress

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.publish.checkpoint import Checkpoint
from kar_offline.publish.feature_records import cutoff_features
from kar_offline.publish.index_snapshots import build_snapshots
from kar_offline.publish.part_writes import CHECKPOINT_EVERY, PartRecords, write_part
from kar_offline.publish.released_entities import EntityRecords, ReleasedEntities
from kar_offline.publish.seals import Seal, claim_features, is_published, read_seal, write_seals
from kar_offline.stage_runner import StageResult, folder_hash
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import PreconditionError
from kar_sidecar.features import schema_hash
from kar_sidecar.index.config import IndexConfig
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import FEATURES, TEXT, Store, schema_meta, vector_part
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import now_ms

__all__ = ["PublishReport", "publish", "publish_release"]


@dataclass(frozen=True, slots=True)
class PublishReport:
    """The content of a release in a store."""

    release_id: str
    users: int
    """Users with a vector."""
    items: int
    """Items with a vector."""
    lent: Mapping[str, int]
    """How many of these users and items have an imputed vector."""
    published_at_ms: int
    """Milliseconds since the epoch."""
    store: str
    """The store, as `--store` names it."""
    written: Mapping[str, int]
    """Records written now, by part; empty if the release was published already."""


def publish(
    work: WorkFolder,
    release_id: str,
    store_url: str,
    *,
    aerospike: AerospikeSettings | None = None,
    force: bool = False,
    max_rate_per_s: int | None = None,
    indexing: IndexConfig | None = None,
    clock: Callable[[], int] = now_ms,
    progress: Progress | None = None,
) -> StageResult[PublishReport]:
    """Publish a release of a work folder; does nothing if it is published already.

    Args:
        work: The work folder.
        release_id: The release.
        store_url: The store, as `--store` names it.
        aerospike: Settings of an Aerospike store.
        force: Publish again; replace features of another schema.
        max_rate_per_s: Maximal records per second; None: no limit.
        indexing: How to build the index; None: the defaults.
        clock: Gives milliseconds since the epoch.
        progress: Shows progress; None: no progress is shown.

    Raises:
        NotFoundError: no such release.
        IntegrityError: the release or the store is corrupt.
        PreconditionError: the dataset or the store has another feature schema.
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
            max_rate_per_s=max_rate_per_s,
            indexing=indexing,
            clock=clock,
            progress=progress,
        )
        seal = read_seal(store, release)
        if seal is None:
            raise PreconditionError(f"another process removed release {release_id} from {store_url}: publish it again")
    finally:
        store.close()
    report = PublishReport(**asdict(seal), store=store_url, written=written)
    return StageResult("publish", index, bool(written), time.perf_counter() - began, report)


def publish_release(
    release: Release,
    dataset: Dataset,
    store: Store,
    index: Path,
    *,
    dataset_hash: str = "",
    force: bool = False,
    max_rate_per_s: int | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    indexing: IndexConfig | None = None,
    clock: Callable[[], int] = now_ms,
    progress: Progress | None = None,
) -> Mapping[str, int]:
    """Write a release into a store and an index folder, unless it is published already.

    Records that the store holds already, unchanged or newer, are not written. A killed publish of the same release,
    dataset and `force` is continued from its checkpoint.

    Args:
        release: The release.
        dataset: The dataset whose features are published.
        store: The store.
        index: The release's folder of index snapshots.
        dataset_hash: Content hash of the dataset, for the checkpoint.
        force: See `publish`.
        max_rate_per_s: See `publish`.
        checkpoint_every: Records between two checkpoints.
        indexing: See `publish`.
        clock: See `publish`.
        progress: See `publish`.

    Returns:
        Written records by part; empty if the release was published already.

    Raises:
        PreconditionError, InputError, UnavailableError: see `publish`.
    """
    schema = release.manifest.feature_schema_hash
    if schema_hash(dataset.schema) != schema:
        raise PreconditionError(f"the dataset has another feature schema than {release.folder}: export a release of it")
    if not force and is_published(store, release, index):
        return {}
    claim = claim_features(store, schema, force)
    users, items = ReleasedEntities.load(release, USER), ReleasedEntities.load(release, ITEM)
    build_snapshots((users, items), index, indexing or IndexConfig(), clock(), rebuild=force)
    identity = {"release_id": release.release_id, "dataset": dataset_hash, "force": force, "claim": claim}
    checkpoint = Checkpoint.read(store, release.release_id, identity)
    written = {
        records.name: write_part(
            records,
            store,
            checkpoint,
            checkpoint_every=checkpoint_every,
            max_rate_per_s=max_rate_per_s,
            progress=progress or Progress(disable=True),
        )
        for records in _release_records(release, dataset, users, items, store, force)
    }
    imputed = {"users": len(users.imputed_ids), "items": len(items.imputed_ids)}
    write_seals(store, release, Seal(release.release_id, len(users.ids), len(items.ids), imputed, clock()))
    return written


def _release_records(
    release: Release, dataset: Dataset, users: ReleasedEntities, items: ReleasedEntities, store: Store, force: bool
) -> Iterator[PartRecords]:
    """All records of a release, part by part."""
    manifest, both = release.manifest, (users, items)
    yield PartRecords(
        "features",
        FEATURES,
        lambda: cutoff_features(release, dataset),
        len(dataset.users) + len(dataset.items),
        newer_only=store.read_meta(schema_meta(manifest.feature_schema_hash)) is not None,
    )
    yield PartRecords(
        "texts",
        TEXT,
        lambda: chain(users.text_records(), items.text_records()),
        sum(len(entities.texts_by_id) for entities in both),
        newer_only=False,
    )
    adapted = [entities for entities in both if entities.kind in release.towers]
    spaces = [("adapted", manifest.adapted_space, adapted), ("encoded", manifest.encoded_space, both)]
    if manifest.affinity.HasField("space"):
        spaces.append(("affinity", manifest.affinity.space, [items.with_affinity()]))
    for name, space, members in spaces:
        yield PartRecords(
            name,
            vector_part(space.space_id),
            partial(_vector_records, name, space, members),
            sum(len(entities.ids) for entities in members),
            newer_only=not force,
        )


def _vector_records(name: str, space: records_pb2.VectorSpace, members: Sequence[ReleasedEntities]) -> EntityRecords:
    return chain.from_iterable(entities.vector_records(name, space) for entities in members)
