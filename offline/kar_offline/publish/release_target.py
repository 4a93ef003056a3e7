"""Owns the published release that takes fresh knowledge: its entities, and the checks before a call is paid for."""

from collections.abc import Mapping
from dataclasses import dataclass

from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.vector_files import Encoding
from kar_offline.publish.affinity_vectors import AffinityVectors
from kar_offline.publish.released_entities import ReleasedEntities
from kar_offline.train.arms import ARMS
from kar_sidecar.entities import ITEM, EntityKind
from kar_sidecar.errors import PreconditionError
from kar_sidecar.features import schema_hash
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import Store, space_meta

__all__ = ["ReleaseTarget"]


@dataclass(frozen=True, slots=True)
class ReleaseTarget:
    """A published release whose vector spaces and feature schema fit a work folder."""

    release: Release
    entities: Mapping[EntityKind, ReleasedEntities]
    """The entities of the release, by kind."""
    affinity: AffinityVectors | None
    """Makes affinity vectors; None if the release has none that texts influence."""

    @staticmethod
    def check(release: Release, store: Store, dataset: Dataset, encoding: Encoding) -> "ReleaseTarget":
        """Check that fresh vectors and features of a work folder fit a release that is in the store.

        Raises:
            PreconditionError: they do not fit, or the release is not published; the message says what to do.
            IntegrityError: the release is corrupt.
        """
        manifest = release.manifest
        if store.read_meta(space_meta(manifest.adapted_space.space_id)) is None:
            raise PreconditionError(f"release {release.release_id} is not in this store: run `kar publish` first")
        if any(ARMS[model.recipe].texts not in ("", "knowledge") for model in manifest.models if model.recipe):
            raise PreconditionError(
                f"release {release.release_id} reads raw texts, not knowledge: name another --release"
            )
        if (encoder_id := encoding.header("knowledge_item").encoder_id) != manifest.encoder_id:
            raise PreconditionError(
                f"{encoding.folder} has vectors of {encoder_id}, not {manifest.encoder_id} as {release.release_id}: "
                "encode with the release's encoder, or export a new release"
            )
        if schema_hash(dataset.schema) != manifest.feature_schema_hash:
            raise PreconditionError(
                f"the dataset has another feature schema than {release.folder}: export a release of it"
            )
        entities = {kind: ReleasedEntities.load(release, kind) for kind in EntityKind}
        return ReleaseTarget(release, entities, AffinityVectors.of(entities[ITEM]))
