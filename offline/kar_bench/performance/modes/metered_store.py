"""Owns a store that measures what is written through it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kar_sidecar.store import EntityKey, Record, Store

__all__ = ["MeteredStore", "WrittenPart"]


@dataclass(slots=True)
class WrittenPart:
    """What was written of one part."""

    records: int = 0
    """Records offered to the store."""
    bytes: int = 0
    seconds: float = 0.0
    """Seconds to make and write the records."""


class MeteredStore:
    """A `Store` that measures what is written through it, by part."""

    def __init__(self, store: Store) -> None:
        """Meter `store`; closing this store closes it."""
        self.store = store
        self.blocking = store.blocking
        self.parts: dict[str, WrittenPart] = {}

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """See `Store.read`."""
        return self.store.read(keys, parts, timeout_s)

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`."""
        meter = self.parts.setdefault(part, WrittenPart())

        def counted() -> Iterator[tuple[EntityKey, bytes]]:
            for key, blob in records:
                meter.records += 1
                meter.bytes += len(blob)
                yield key, blob

        began = time.perf_counter()
        written = self.store.write(part, counted(), newer_only=newer_only)
        meter.seconds += time.perf_counter() - began
        return written

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`."""
        return self.store.remove_part(part)

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`."""
        return self.store.read_meta(name)

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`."""
        self.store.write_meta(name, value)

    def close(self) -> None:
        """See `Store.close`."""
        self.store.close()
