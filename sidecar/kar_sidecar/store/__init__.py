"""Owns where knowledge vectors and features live online: the Protocol, the record layout, the implementations."""

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
    """Name of the meta value that says that a vector space is completely published."""
    return f"space:{space_id}"


def schema_meta(schema_hash: str) -> str:
    """Name of the meta value that says that features of a schema are completely published."""
    return f"schema:{schema_hash}"


class EntityKey(NamedTuple):
    """Names one entity: its kind and its id."""

    kind: EntityKind
    id: str


Record = tuple[bytes | None, ...]
"""The parts of one entity in the order asked for; None where a part is absent."""


class Store(Protocol):
    """Entities with independently written parts; see `kar_sidecar.store.records` for the bytes of a part.

    Reads are one batch a request. Every method may raise `UnavailableError`.
    """

    blocking: bool
    """Whether reads leave the process: then the server calls them from a thread."""

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """Read `parts` of all `keys` in one batch, in the order of `keys`; duplicates are allowed.

        Raises:
            DeadlineError: no answer within `timeout_s`.
            IncompleteError: some records could not be read; it carries those that could.
        """
        ...

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """Write one part of many entities, leaving their other parts alone; returns how many were written.

        A record whose very bytes are there already is not written. With `newer_only`, a record is kept when its
        header's `written_at` is not older than the new one's; texts, which have no header, cannot be written so. Of
        several records of one key the last one counts.
        """
        ...

    def remove_part(self, part: str) -> int:
        """Remove one part of every entity, such as a drained vector space; returns how many had it."""
        ...

    def read_meta(self, name: str) -> bytes | None:
        """Read a small named value that belongs to the store as a whole."""
        ...

    def write_meta(self, name: str, value: bytes | None) -> None:
        """Write a small named value, replacing it; None removes it."""
        ...

    def close(self) -> None:
        """Release files and connections. The store cannot be used afterwards."""
        ...
