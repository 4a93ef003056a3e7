"""Owns the embedded store: one memory-mapped LMDB file, many reader processes beside one writer.

A key is the kind's number as a byte, the part, NUL and the id. An id too long for LMDB's keys is replaced by 0xFF (a
byte that UTF-8 never contains) and its hash. Keys of meta values start with the byte 0, which is no kind's number.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

import lmdb

from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import IntegrityError, PreconditionError, UnavailableError
from kar_sidecar.store import EntityKey, Record
from kar_sidecar.store.records import in_batches, is_newer

__all__ = ["LmdbStore"]

MAP_SIZE_BYTES: Final = 64 << 30
"""Address space that is reserved; the file itself grows as it is written."""
MAX_READERS: Final = 1024
BATCH: Final = 10_000
"""Records in one write transaction; bounds how long another writer waits."""
BATCH_BYTES: Final = 4 << 20
"""A write transaction ends with the record that reaches this size; bounds the flush that another writer waits for."""
LONGEST_ID_BYTES: Final = 440
DATA: Final = "data.mdb"


def _prefix(kind: EntityKind, part: str) -> bytes:
    return bytes([kind.number]) + part.encode() + b"\0"


def _meta_key(name: str) -> bytes:
    return b"\0" + name.encode() + b"\0"


def _id_bytes(identity: str) -> bytes:
    raw = identity.encode()
    return raw if len(raw) <= LONGEST_ID_BYTES else b"\xff" + hashlib.blake2b(raw, digest_size=32).digest()


class LmdbStore:
    """A `Store` in a folder. Open it once per process. The next read in any process sees a finished write."""

    blocking = False

    def __init__(self, path: Path, map_size_bytes: int = MAP_SIZE_BYTES, readonly: bool = False) -> None:
        """Open, and unless `readonly` create, the store below `path`.

        Raises:
            PreconditionError: `readonly`, and the store is empty.
            IntegrityError: the file is truncated or not LMDB's; the text names it.
        """
        self._file = path / DATA
        if readonly and not (self._file.is_file() and self._file.stat().st_size):
            raise PreconditionError(f"the store {path} is empty: run `kar publish` first")
        if not readonly:
            path.mkdir(parents=True, exist_ok=True)
        with self._failures():
            self._env = lmdb.open(
                str(path), map_size=map_size_bytes, max_readers=MAX_READERS, readonly=readonly, create=not readonly
            )
            if readonly and self._missing_bytes() > 0:
                self._env.close()
                raise IntegrityError(f"{self._file} is truncated: delete its folder and publish again")
            self._env.reader_check()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        damaged = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError)
        try:
            yield
        except damaged as error:
            raise IntegrityError(f"{self._file} is corrupt ({error}): delete its folder and publish again") from error
        except lmdb.MapFullError as error:
            raise PreconditionError(f"{self._file} is full: open it with a larger map_size_bytes") from error
        except lmdb.Error as error:
            raise UnavailableError(f"{self._file} cannot be used: {error}") from error

    def _missing_bytes(self) -> int:
        """Bytes missing up to the end of the last page. Reading a page beyond the end of the file kills the process."""
        pages = self._env.info()["last_pgno"] + 1
        return pages * self._env.stat()["psize"] - self._file.stat().st_size

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        with self._failures():
            with self._env.begin(write=True) as transaction:
                yield transaction
            # LMDB does not write pages that it freed in the same transaction. The file is extended to include them, so
            # that its size shows whether it is complete.
            if (missing := self._missing_bytes()) > 0:
                os.truncate(self._file, self._file.stat().st_size + missing)

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """See `Store.read`; the whole batch sees one state of the store."""
        prefixes = {kind: [_prefix(kind, part) for part in parts] for kind in {key.kind for key in keys}}
        with self._failures(), self._env.begin() as transaction:
            get = transaction.get
            return [
                tuple([get(prefix + identity) for prefix in prefixes[kind]])
                for kind, identity in ((key.kind, _id_bytes(key.id)) for key in keys)
            ]

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`; a killed write leaves complete batches of at most `BATCH` records."""
        written = 0
        prefixes = {kind: _prefix(kind, part) for kind in EntityKind}
        for batch in in_batches(records, BATCH, BATCH_BYTES):
            with self._writing() as transaction:
                for key, blob in batch.items():
                    name = prefixes[key.kind] + _id_bytes(key.id)
                    stored = transaction.get(name)
                    if is_newer(blob, stored) if newer_only else blob != stored:
                        transaction.put(name, blob)
                        written += 1
        return written

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`."""
        return sum(self._remove_prefix(_prefix(kind, part)) for kind in EntityKind)

    def _remove_prefix(self, prefix: bytes) -> int:
        removed = 0
        while True:
            with self._writing() as transaction:
                cursor = transaction.cursor()
                cursor.set_range(prefix)
                names = map(bytes, islice(cursor.iternext(values=False), BATCH))
                matching = [name for name in names if name.startswith(prefix)]
                for name in matching:
                    transaction.delete(name)
            removed += len(matching)
            if len(matching) < BATCH:
                return removed

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`."""
        with self._failures(), self._env.begin() as transaction:
            return transaction.get(_meta_key(name))

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`."""
        with self._writing() as transaction:
            if value is None:
                transaction.delete(_meta_key(name))
            else:
                transaction.put(_meta_key(name), value)

    def close(self) -> None:
        """See `Store.close`."""
        self._env.close()
