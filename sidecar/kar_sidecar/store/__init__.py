"""Owns the online store of knowledge vectors, features and texts: the Protocol, the bytes of a record, the stores.

This file has the Protocol, and the names of parts and meta values.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from kar_sidecar.entities import EntityKind

__all__ = [
    "FEATURES",
    "TEXT",
    "EntityKey",
    "Record",
    "Store",
    "schema_meta",
    "space_meta",
    "vector_part",
]

FEATURES = "features"
TEXT = "text"


def vector_part(space_id: str) -> str:
    """Name of the record part that holds vectors of one space (12 hexadecimal digits)."""
    return f"v{space_id}"


def space_meta(space_id: str) -> str:
    """Name of the meta value that exists once all vectors of a space are published: its seal."""
    return f"space:{space_id}"


def schema_meta(schema_hash: str) -> str:
    """Name of the meta value that exists once all features of a schema are published: its seal."""
    return f"schema:{schema_hash}"


class EntityKey(NamedTuple):
    """Names one entity: its kind and its id."""

    kind: EntityKind
    id: str


Record = tuple[bytes | None, ...]
"""The requested parts of one entity, in the order of the request; None where a part is absent."""


class Store(Protocol):
    """Stores the parts of entities; each part is written on its own. `kar_sidecar.store.records` owns a part's bytes.

    Every method may raise `UnavailableError`.
    """

    blocking: bool
    """Whether reads leave the process; the server then calls them from a thread."""

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """Read `parts` of all `keys` in one batch, in the order of `keys`; a key may be repeated.

        Raises:
            DeadlineError: no answer within `timeout_s`.
            IncompleteError: some records could not be read; the error carries the others.
        """
        ...

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """Write one part of many entities and keep their other parts; returns the number of records written.

        A record that is already stored with the same bytes is skipped. With `newer_only`, a record is also skipped if
        the stored part's header has an equal or later `written_at_ms`; texts have no header, so they cannot be written
        with `newer_only`. When a key is repeated, its last record wins.
        """
        ...

    def remove_part(self, part: str) -> int:
        """Remove one part of every entity, such as the vectors of an unused space; returns how many entities had it."""
        ...

    def read_meta(self, name: str) -> bytes | None:
        """Read a small named value of the whole store; None where it was never written."""
        ...

    def write_meta(self, name: str, value: bytes | None) -> None:
        """Write or replace a small named value; None removes it."""
        ...

    def close(self) -> None:
        """Release files and connections. The store cannot be used afterwards."""
        ...
