"""Owns the in-memory store: one process, no files; for tests and experiments."""

import threading
from collections.abc import Iterable, Sequence

from kar_sidecar.store import EntityKey, Record
from kar_sidecar.store.records import is_newer

__all__ = ["MemoryStore"]


class MemoryStore:
    """A `Store` in dictionaries; its content ends with the process."""

    blocking = False

    def __init__(self) -> None:
        """Start empty."""
        self._parts: dict[str, dict[EntityKey, bytes]] = {}
        self._meta: dict[str, bytes] = {}
        self._writing = threading.Lock()

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """See `Store.read`."""
        columns = [self._parts.get(part, {}) for part in parts]
        return [tuple(column.get(key) for column in columns) for key in keys]

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`."""
        column = self._parts.setdefault(part, {})
        written = 0
        for key, blob in records:
            with self._writing:
                stored = column.get(key)
                if is_newer(blob, stored) if newer_only else blob != stored:
                    column[key] = blob
                    written += 1
        return written

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`."""
        return len(self._parts.pop(part, {}))

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`."""
        return self._meta.get(name)

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`."""
        if value is None:
            self._meta.pop(name, None)
        else:
            self._meta[name] = value

    def close(self) -> None:
        """See `Store.close`."""
