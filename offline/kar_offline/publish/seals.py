"""Owns the seals of a publish: meta values of the store, written last, which mark complete parts of a release.

space:<id>       a vector space; the adapted space belongs to one release, the others may be shared
schema:<hash>    features packed by a schema
features         the one schema that the store's features are packed by, and the number of times that it has changed
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from kar.records.v1 import records_pb2
from kar_offline.publish.checkpoint import publish_meta
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import PreconditionError
from kar_sidecar.index.snapshot import read_current
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import Store, schema_meta, space_meta

__all__ = ["Seal", "claim_features", "is_published", "read_seal", "write_seals"]

FEATURE_SCHEMA: Final = "features"


@dataclass(frozen=True, slots=True)
class Seal:
    """The value of a seal. Releases that share a space or schema overwrite each other's seal of it."""

    release_id: str
    users: int
    """Users with a vector."""
    items: int
    """Items with a vector."""
    lent: Mapping[str, int]
    """Numbers of "users" and "items" among them whose vector was imputed."""
    published_at_ms: int
    """Milliseconds since the epoch."""


def read_seal(store: Store, release: Release) -> Seal | None:
    """The seal of a release's adapted space; None if the release is not published."""
    value = store.read_meta(space_meta(release.manifest.adapted_space.space_id))
    if not value:
        return None
    # Releases that were published before vectors were imputed have no `lent`.
    fields = {"lent": {"users": 0, "items": 0}} | json.loads(value)
    return Seal(*(fields[name] for name in Seal.__slots__))


def write_seals(store: Store, release: Release, seal: Seal) -> None:
    """Write all seals of a release and remove its checkpoint."""
    value = json.dumps(asdict(seal)).encode()
    for name in _shared_seals(release.manifest):
        store.write_meta(name, value)
    store.write_meta(publish_meta(release.release_id), None)
    # The adapted space belongs to this release alone. Its seal comes last and marks the whole release as complete.
    store.write_meta(space_meta(release.manifest.adapted_space.space_id), value)


def is_published(store: Store, release: Release, index: Path) -> bool:
    """Whether a release is completely published in a store, and its index snapshots exist.

    Seals of shared spaces and of the schema may name another release: the one that was published last.
    """
    seal = read_seal(store, release)
    return (
        seal is not None
        and seal.release_id == release.release_id
        and all(store.read_meta(name) is not None for name in _shared_seals(release.manifest))
        and all(read_current(index / kind) is not None for kind in EntityKind)
    )


def _shared_seals(manifest: records_pb2.Manifest) -> list[str]:
    """Names of the seals that releases with the same schema and encoder share."""
    spaces = [manifest.encoded_space]
    if manifest.affinity.HasField("space"):
        spaces.append(manifest.affinity.space)
    return [schema_meta(manifest.feature_schema_hash), *(space_meta(space.space_id) for space in spaces)]


def claim_features(store: Store, schema: str, force: bool) -> str:
    """Make `schema` the one that the store's features are packed by, before any feature is written.

    Args:
        store: The store.
        schema: Hash of the schema.
        force: Whether features of another schema may be replaced.

    Returns:
        The claim. It differs after each change of schema, so that a checkpoint from before a change does not count,
        even if a release of the first schema has claimed the features again.

    Raises:
        PreconditionError: the store holds features of another schema.
    """
    claim = (store.read_meta(FEATURE_SCHEMA) or b"").decode()
    claimed_schema, _, changes = claim.partition(" ")
    if claimed_schema == schema:
        return claim
    claim = schema
    if claimed_schema:
        if not force:
            raise PreconditionError(
                f"the store holds features of schema {claimed_schema}, this release needs {schema} and would break "
                "the releases that serve from it: publish to another --store, or use --force once they are retired"
            )
        store.write_meta(schema_meta(claimed_schema), None)
        claim = f"{schema} {int(changes or 0) + 1}"
    store.write_meta(FEATURE_SCHEMA, claim.encode())
    return claim
